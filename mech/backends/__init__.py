"""Other libraries' forward passes behind one function: `hf` (ours), `nnsight`, `transformer_lens`.

    read = open_backend("nnsight", model)
    read(ids, {("resid_post", 3)}, visit)

A backend is checked against Hugging Face when it is opened, and refused where it disagrees. The user's model stays as it was.
"""

from mech.backends.open import BACKENDS, open_backend
from mech.backends.parity import Parity, check_parity
from mech.backends.reader import Reader, Visit

__all__ = ["BACKENDS", "Parity", "Reader", "Visit", "check_parity", "open_backend"]
