"""Child processes for tests that kill them."""

import multiprocessing

from study.kinds import KINDS

# Forked from a server that has imported everything and computed nothing: quick, and safe for torch's threads.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "study.run",
        "tests.tiny_study",
        "peft",
        "sklearn.decomposition",
        "transformers.models.llama.modeling_llama",
        # Transformers loads the rest of itself when it is asked for a name: three seconds in every child.
        *sorted({k.home.split(":")[0] for k in KINDS.values()}),
    ]
)
