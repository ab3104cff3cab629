"""GPT-2 weights in Hugging Face's layout: read, written, and equal to the reference.

tests/gpt2_golden/ holds a small random model as `transformers` writes it, and what `transformers`
computes with it; `make_golden` is the recipe. Only the last test needs that package.
"""

import dataclasses
import json
import os
import shutil
import struct
import tracemalloc
import urllib.error
from pathlib import Path

import pytest
import torch

import evaluate_gpt2
import lora
import model as model_file
import quant
import train_gpt2_fusion as train
from data_loader import UserError
from model import (
    GPT,
    ModelConfig,
    diffusion_loss,
    read_pretrained,
    read_safetensors,
    write_safetensors,
)

GOLDEN = Path(__file__).parent / "gpt2_golden"
SIZES = dict(vocab_size=61, d_model=32, n_layers=2, n_heads=4)  # of the golden model
TWO_BLOCKS = ModelConfig(
    **SIZES, seq_len=16, total_blocks=2, block_size=1, block_mask_ranges=((0.0, 0.5), (0.5, 1.0))
)


def reference_model(seed, n_positions, **sizes):
    """A random transformers.GPT2LMHeadModel, far from its flat start. Needs transformers."""
    import transformers

    end = sizes["vocab_size"] - 1
    config = transformers.GPT2Config(
        n_positions=n_positions, bos_token_id=end, eos_token_id=end, **sizes
    )
    reference = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in reference.named_parameters():
        start = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        linear = parameter.dim() == 2 and ".h." in name
        scale = sizes["n_embd"] ** -0.5 if linear else 0.3
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = start + scale * noise
    return reference


def make_golden():
    """The recipe of tests/gpt2_golden/ (torch 2.13.0, transformers 5.23.0, safetensors 0.8.0)."""
    from safetensors.torch import save_file

    reference = reference_model(0, 16, vocab_size=61, n_embd=32, n_layer=2, n_head=4)
    reference.save_pretrained(GOLDEN)
    (GOLDEN / "generation_config.json").unlink(missing_ok=True)
    idx = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    out = reference(idx, labels=idx)
    out.loss.backward()
    parameters = dict(reference.transformer.named_parameters())
    grads = ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias",
             "h.1.mlp.c_proj.weight", "h.1.ln_2.weight", "ln_f.bias")  # fmt: skip
    expected = {"idx": idx, "logits": out.logits.detach(), "loss": out.loss.detach()}
    expected |= {f"grad.{name}": parameters[name].grad for name in grads}
    save_file(expected, GOLDEN / "expected.safetensors")


def next_token_loss(model, idx):
    """The diffusion loss at m = 0: GPT-2's own loss."""
    mask = torch.zeros(idx.shape, dtype=torch.bool)
    return diffusion_loss(model, idx, idx, mask, torch.zeros(len(idx)), model.blocks - 1)[0]


def compare(model, idx, logits, loss, grads):
    """1e-4 on every logit, 1e-4 relative on the loss and on each gradient, as the issue asks."""
    n_text = model.config.vocab_size
    ours = model(idx)
    torch.testing.assert_close(ours[..., :n_text], logits, atol=1e-4, rtol=0)
    assert (ours[..., n_text:] == -torch.inf).all()
    if loss is None:
        return
    model.zero_grad()
    ours = next_token_loss(model, idx)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-4)
    parameters = dict(model.named_parameters())
    for name, expected in grads.items():
        grad = parameters[name.replace("ln_f", f"exit_norms.{model.blocks - 1}")].grad
        grad = grad[:n_text] if name == "wte.weight" else grad
        grad = grad.t() if name.startswith("h.") else grad
        error = (grad - expected).norm() / expected.norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


def golden_copy(folder, change=None, **description):
    """The golden model in `folder`, tensors after `change(tensors)`, config.json updated."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = read_safetensors(GOLDEN / "model.safetensors")
    tensors = (change and change(tensors)) or tensors
    write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((GOLDEN / "config.json").read_text()) | description
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same(a, b):
    """Whether two GPTs have the same parameters, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------- parity


def test_golden_logits_loss_and_gradients():
    expected = read_safetensors(GOLDEN / "expected.safetensors")
    grads = {n.removeprefix("grad."): t for n, t in expected.items() if n.startswith("grad.")}
    model = GPT.from_pretrained(GOLDEN)
    assert model.config == ModelConfig(
        **SIZES, seq_len=16, total_blocks=1, block_size=2, block_mask_ranges=((0.0, 1.0),),
        init_from=str(GOLDEN),
    )  # fmt: skip
    compare(model, expected["idx"], expected["logits"], expected["loss"], grads)
    assert expected["logits"].std() > 1  # far from flat, so that the comparison means something


def test_golden_fixture_is_small():
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 300_000


# ------------------------------------------------------------------------------------- reading


def test_every_spelling_of_the_layout_gives_the_same_model(tmp_path):
    reference = GPT.from_pretrained(GOLDEN)

    def bare(tensors):
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

    def with_head(tensors):
        return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}

    def with_buffers(tensors):
        mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
        buffers = {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.bias": mask.float()}
        return tensors | buffers | {"transformer.h.0.attn.masked_bias": torch.tensor([-1e4])}

    for i, change in enumerate((bare, with_head, with_buffers)):
        folder = golden_copy(tmp_path / str(i), change)
        assert same(GPT.from_pretrained(folder), reference), change.__name__
        assert same(GPT.from_pretrained(folder / "model.safetensors"), reference)
    tensors = with_head(with_buffers(read_safetensors(GOLDEN / "model.safetensors")))
    for legacy in (False, True):  # the second is how files were before 2020
        file = tmp_path / f"bin{legacy}" / "pytorch_model.bin"
        file.parent.mkdir()
        torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
        shutil.copy(GOLDEN / "config.json", file.parent)
        assert same(GPT.from_pretrained(file), reference)
        assert same(GPT.from_pretrained(file.parent), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_fp32(tmp_path, dtype):
    half = golden_copy(tmp_path, lambda tensors: {n: t.to(dtype) for n, t in tensors.items()})
    reference, model = GPT.from_pretrained(GOLDEN), GPT.from_pretrained(half)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if name != "wte.weight":
            assert torch.equal(parameter, reference.get_parameter(name).to(dtype).float()), name
    assert torch.equal(model.wte.weight[:61], reference.wte.weight[:61].to(dtype).float())


def test_the_trainers_config_is_filled_block_by_block():
    config = dataclasses.replace(TWO_BLOCKS, seq_len=12, attention_mode="bidirectional")
    same_config, tensors = read_pretrained(GOLDEN, config)
    assert same_config is config
    model = GPT(config, blocks=0)
    model.grow()
    model.fill_from(tensors, 0)
    stored = read_safetensors(GOLDEN / "model.safetensors")
    torch.testing.assert_close(model.wpe.weight, stored["transformer.wpe.weight"][:12])  # cropped
    text = stored["transformer.wte.weight"]
    assert torch.equal(model.wte.weight[:61], text)
    assert (model.wte.weight[61:] == text.mean(0)).all()  # [MASK] and the padding rows
    model.exit_norms[0].weight.data.fill_(7.0)  # as if trained; the next stage starts from ln_f
    first = {name: p.clone() for name, p in model.block_parameters(0).items()}
    model.grow()
    model.fill_from(tensors, 1)
    assert all(torch.equal(p, first[name]) for name, p in model.block_parameters(0).items())
    assert torch.equal(model.exit_norms[1].weight, stored["transformer.ln_f.weight"])
    assert torch.equal(model.exit_norms[1].bias, stored["transformer.ln_f.bias"])
    model.exit_norms[0].load_state_dict(model.exit_norms[1].state_dict())
    assert same(model, GPT.from_pretrained(GOLDEN, config))


def test_reading_does_not_change_the_file(tmp_path):
    folder = golden_copy(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").chmod(0o444)
    _, tensors = read_pretrained(folder)
    tensors["wte.weight"].zero_()  # a private mapping
    GPT.from_pretrained(folder).wte.weight.data.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(vocab_size=62), ["model.vocab_size=61 (not 62)"]),
        (dict(d_model=64), ["model.d_model=32 (not 64)"]),
        (dict(n_heads=2), ["model.n_heads=4 (not 2)"]),
        (dict(n_layers=4, block_size=2), ["model.n_layers=2 (not 4)"]),
        (dict(seq_len=17), ["model.seq_len=16 (not 17)"]),
        (dict(seq_len=17, vocab_size=62), ["model.vocab_size=61", "model.seq_len=16"]),
    ],
)
def test_sizes_that_disagree_are_named(changes, words):
    with pytest.raises(ValueError, match="config.json: ") as caught:
        GPT.from_pretrained(GOLDEN, dataclasses.replace(TWO_BLOCKS, **changes))
    assert all(word in str(caught.value) for word in words)
    assert str(caught.value).count("model.") == len(words)  # and nothing that agrees
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "description, word",
    [
        (dict(activation_function="relu"), "activation_function 'relu'"),
        (dict(activation_function="gelu"), "activation_function 'gelu'"),
        (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon 1e-06"),
        (dict(model_type="llama"), "model_type 'llama'"),
        (dict(scale_attn_weights=False), "scale_attn_weights"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings"),
        (dict(n_layer=None), "n_layer"),
        (dict(n_embd="32"), "n_embd"),
        (dict(n_head=5), "n_heads 5 does not divide"),
    ],
)
def test_another_network_is_refused_by_name(tmp_path, description, word):
    folder = golden_copy(tmp_path, **description)
    with pytest.raises(ValueError, match="config.json: ") as caught:
        GPT.from_pretrained(folder)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_all_wrong_tensors_are_named_in_one_line(tmp_path):
    def spoil(tensors):
        tensors = dict(tensors)
        del tensors["transformer.h.1.ln_2.bias"], tensors["transformer.ln_f.weight"]
        tensors["transformer.h.0.crossattention.c_attn.weight"] = torch.zeros(2)
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(96, 32)  # not transposed
        tensors["transformer.wpe.weight"] = torch.zeros(16, 32, dtype=torch.int64)
        return tensors

    with pytest.raises(ValueError, match="model.safetensors: ") as caught:
        GPT.from_pretrained(golden_copy(tmp_path, spoil))
    message = str(caught.value)
    for part in (
        "h.1.ln_2.bias is missing",
        "ln_f.weight is missing",
        "h.0.crossattention.c_attn.weight is unknown",
        "h.0.attn.c_attn.weight is torch.float32 (96, 32), not float (32, 96)",
        "wpe.weight is torch.int64 (16, 32)",
    ):
        assert part in message
    assert message.count(";") == 4 and "\n" not in message


def test_an_untied_head_is_refused(tmp_path):
    folder = golden_copy(tmp_path, lambda t: t | {"lm_head.weight": torch.zeros(61, 32)})
    with pytest.raises(ValueError, match="lm_head.weight is not wte.weight"):
        GPT.from_pretrained(folder)


def test_a_folder_without_weights_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model.safetensors.*set model.init_from"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        GPT.from_pretrained(tmp_path / "nowhere")
    shutil.copy(GOLDEN / "model.safetensors", tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json"):
        GPT.from_pretrained(tmp_path)
    for text in ("", "{", "[]", "[" * 5000, "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="config.json: not the config.json of a GPT-2"):
            GPT.from_pretrained(tmp_path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_pickle_that_is_no_plain_tensors_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    file = tmp_path / "pytorch_model.bin"
    for value in (Evil(), {"a": Evil()}, [1], {"a": 1}, {0: torch.zeros(1)},
                  {"a": torch.eye(2).to_sparse()}):  # fmt: skip
        for legacy in (False, True):
            torch.save(value, file, _use_new_zipfile_serialization=not legacy)
            with pytest.raises(ValueError, match="refused, not plain tensors") as caught:
                GPT.from_pretrained(tmp_path)
            assert "\n" not in str(caught.value)
    file.write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="refused, not plain tensors"):
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / "evil").exists()


# ------------------------------------------------------------------------------- the file format


def packed(header, data=b"", length=None):
    """The bytes of a safetensors file; header: bytes, or what becomes JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


MALFORMED = {
    "empty file": (b"", "truncated"),
    "seven bytes": (b"\x02" + b"\0" * 6, "truncated"),
    "header longer than the file": (packed({}, length=3), "truncated"),
    "header of 2**64 - 1 bytes": (packed({}, length=2**64 - 1), "truncated"),
    "header of 1 TB": (packed({}, length=10**12), "truncated"),
    "not JSON": (packed(b"{,}"), "not JSON"),
    "not UTF-8": (packed(b'{"\xff\xfe": 1}'), "not JSON"),
    "nested without end": (packed(b"[" * 200_000), "not JSON"),
    "a list": (packed([]), "not a JSON object"),
    "entry is a number": (packed({"a": 1}), "without a known dtype"),
    "no dtype": (packed({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"), "without a known"),
    "unknown dtype": (packed({"a": entry(0, 4, dtype="F31")}, b"1234"), "without a known dtype"),
    "dtype is a list": (packed({"a": entry(0, 4, dtype=["F32"])}, b"1234"), "without a known"),
    "three offsets": (packed({"a": entry(0, 4) | {"data_offsets": [0, 4, 4]}}, b"1234"), "without"),
    "offset is a float": (packed({"a": entry(0.0, 4)}, b"1234"), "without a known"),
    "shape is a number": (packed({"a": entry(0, 4) | {"shape": 1}}, b"1234"), "without a known"),
    "nine dimensions": (packed({"a": entry(0, 4, [1] * 9)}, b"1234"), "without a known"),
    "negative shape": (packed({"a": entry(0, 4, [-1, -1])}, b"1234"), "impossible shape"),
    "shape of floats": (packed({"a": entry(0, 4, [1.0])}, b"1234"), "impossible shape"),
    "shape of booleans": (packed({"a": entry(0, 4, [True])}, b"1234"), "impossible shape"),
    "a huge shape": (packed({"a": entry(0, 4, [2**62, 4])}, b"1234"), "impossible shape"),
    "shape and span differ": (packed({"a": entry(0, 8)}, b"12345678"), "do not agree"),
    "end before start": (packed({"a": entry(4, 0)}, b"1234"), "do not agree"),
    "out of range": (packed({"a": entry(0, 8, [2])}, b"1234"), "beyond the file"),
    "far out of range": (packed({"a": entry(2**63, 2**63 + 4)}, b"1234"), "beyond the file"),
    "negative start": (packed({"a": entry(-4, 0)}, b"1234"), "beyond the file"),
    "a hole": (packed({"a": entry(0, 4), "b": entry(8, 12)}, b"1" * 12), "leaves a hole"),
    "a hole in front": (packed({"a": entry(4, 8)}, b"1" * 8), "leaves a hole"),
    "overlap": (packed({"a": entry(0, 8, [2]), "b": entry(4, 8)}, b"1" * 8), "overlaps"),
    "the same bytes twice": (packed({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), "overlaps"),
    "bytes left over": (packed({"a": entry(0, 4)}, b"12345"), "belong to no tensor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_safetensors(tmp_path, case):
    content, words = MALFORMED[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=words) as caught:
            read_safetensors(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(file)) + 200
    assert peak < 10_000_000, peak


def test_a_header_over_100_mb_is_not_read(tmp_path):
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as sparse:
        sparse.write(struct.pack("<Q", (100 << 20) + 1))
        sparse.truncate(200 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="header of 104857601 bytes"):
            read_safetensors(file)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_every_truncation_is_refused(tmp_path):
    whole = (GOLDEN / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    for n in [*range(0, 16), *range(16, len(whole), 997), len(whole) - 1]:
        file.write_bytes(whole[:n])
        with pytest.raises(ValueError):
            read_safetensors(file)


def test_safetensors_round_trip_of_odd_shapes_and_types(tmp_path):
    tensors = {
        "half": torch.arange(5).half(),  # leaves what follows unaligned
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "double": torch.tensor([1 / 3], dtype=torch.float64),
        "bfloat": torch.randn(3, 1, 2).bfloat16(),
        "long": torch.tensor([-(2**60)]),
        "mask": torch.tensor([True, False, True]),
        "byte": torch.tensor([255], dtype=torch.uint8),
    }
    write_safetensors(tmp_path / "x", tensors)
    back = read_safetensors(tmp_path / "x")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    # A header that is not padded to 8 bytes is allowed too.
    (tmp_path / "y").write_bytes(packed({"a": entry(0, 4)}, struct.pack("<f", 1.5)))
    assert read_safetensors(tmp_path / "y")["a"].tolist() == [1.5]


# ------------------------------------------------------------------------------------- writing


def test_round_trip_is_exact(tmp_path):
    model = GPT.from_pretrained(GOLDEN)
    model.save_pretrained(tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["config.json", "model.safetensors"]
    assert same(GPT.from_pretrained(tmp_path / "a" / "b"), model)
    ours = read_safetensors(tmp_path / "a" / "b" / "model.safetensors")
    theirs = read_safetensors(GOLDEN / "model.safetensors")
    assert ours.keys() == theirs.keys()  # names, shapes and bits as the reference writes them
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    theirs = json.loads((GOLDEN / "config.json").read_text())
    for key, value in json.loads((tmp_path / "a" / "b" / "config.json").read_text()).items():
        if "pdrop" not in key:
            assert theirs[key] == value, key


def test_an_earlier_exit_is_a_shorter_gpt2(tmp_path):
    model = GPT.from_pretrained(GOLDEN, TWO_BLOCKS)
    model.exit_norms[0].weight.data *= 1.5  # each exit reads through its own norm
    idx = torch.arange(16)[None]
    for exit in (0, 1, None):
        model.save_pretrained(tmp_path, exit)  # over the file of the exit before
        loaded = GPT.from_pretrained(tmp_path)
        assert len(loaded.h) == (1 if exit == 0 else 2)
        assert torch.equal(loaded(idx)[..., :61], model(idx, exit)[..., :61])
    with pytest.raises(ValueError, match="exit 2 does not exist"):
        model.save_pretrained(tmp_path, 2)


@pytest.mark.parametrize("kind", quant.KINDS)
def test_quantized_layers_and_adapters(tmp_path, kind):
    """Exit 1 with block 0 quantized and adapted: refused, then merged, then the same logits."""
    model = GPT.from_pretrained(GOLDEN, TWO_BLOCKS)
    quant.freeze_block(model, 0, kind)
    idx = torch.arange(16)[None]
    model.save_pretrained(tmp_path / "quantized")
    loaded = GPT.from_pretrained(tmp_path / "quantized")
    torch.testing.assert_close(loaded(idx)[..., :61], model(idx)[..., :61], atol=1e-4, rtol=1e-4)
    before = model(idx)
    for parameter in lora.add_adapters(model, 1, rank=2, alpha=4):
        parameter.data.normal_(std=0.1)
    assert (model(idx) - before)[..., :61].abs().max() > 0.1
    with pytest.raises(ValueError, match=r"lora.merge\(model, exit\)"):
        model.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    lora.merge(model, 1).save_pretrained(tmp_path / "merged")
    loaded = GPT.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(idx)[..., :61], model(idx)[..., :61], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_chosen_precision(tmp_path, dtype):
    model = GPT.from_pretrained(GOLDEN)
    model.save_pretrained(tmp_path, dtype=dtype)
    for tensor in read_safetensors(tmp_path / "model.safetensors").values():
        assert tensor.dtype == dtype
    loaded = GPT.from_pretrained(tmp_path)
    assert torch.equal(loaded.wpe.weight, model.wpe.weight.to(dtype).float())


def test_what_the_layout_cannot_hold_is_refused(tmp_path):
    model = GPT.from_pretrained(GOLDEN)
    model.h[1].mlp.c_fc.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match="h.1.mlp.c_fc.weight has values that are not finite"):
        model.save_pretrained(tmp_path, dtype=torch.float16)
    both = dataclasses.replace(model.config, attention_mode="bidirectional")
    with pytest.raises(ValueError, match="causal"):
        GPT.from_pretrained(GOLDEN, both).save_pretrained(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_failing_write_keeps_the_old_file(tmp_path, monkeypatch):
    model = GPT.from_pretrained(golden_copy(tmp_path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_file.os, "fsync", full_disk)
    model.wpe.weight.data.zero_()
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# ------------------------------------------------------------------------------------ download


def test_download(tmp_path, monkeypatch):
    """`gpt2` without a network is one clear line; with one, two files, fetched once, checked."""
    monkeypatch.chdir(tmp_path)
    source, asked = GOLDEN, []

    def retrieve(url, target):
        asked.append(url)
        if source is None:
            raise urllib.error.URLError("no network")
        shutil.copy(source / url.rpartition("/")[2], target)

    monkeypatch.setattr(model_file.urllib.request, "urlretrieve", retrieve)
    source = None
    with pytest.raises(OSError, match="cannot download GPT-2's config.json .*no network.*cache"):
        GPT.from_pretrained("gpt2", cache="cache")
    source = tmp_path / "bad"
    golden_copy(source)
    (source / "model.safetensors").write_bytes(b"<html>please log in</html>")
    with pytest.raises(OSError, match="cannot download GPT-2's model.safetensors"):
        GPT.from_pretrained("gpt2", cache="cache")
    assert not (tmp_path / "cache" / "gpt2" / "model.safetensors").exists()
    source = GOLDEN
    model = GPT.from_pretrained("gpt2", cache="cache")
    n = len(asked)
    assert same(GPT.from_pretrained("gpt2", cache="cache"), model) and len(asked) == n
    assert same(GPT.from_pretrained(GOLDEN), model)
    assert asked[-1].endswith("gpt2/resolve/main/model.safetensors")


# ---------------------------------------------------------------- runs: in, out and plain QLoRA

NEXT_TOKEN = {"training__mode": "standard", "training__time_step_masking": "false"}


def evaluate(toy, *options):
    return evaluate_gpt2.main(["--folder", str(toy.folder.parent), *map(str, options)])


@pytest.fixture
def ended(monkeypatch):
    """ended(arguments): train without the report at the end; -> the model as it was in memory."""
    kept = []
    monkeypatch.setattr(train, "report", lambda _, model, **options: kept.append(model) or {})

    def run(arguments):
        assert train.main(arguments) == 0
        return kept[-1].eval()

    return run


@pytest.mark.parametrize("kind, tolerance", [("fp32", 0), ("fp16", 1e-3), ("int4", 0.1)])
def test_plain_qlora_begins_at_the_pretrained_loss(tmp_path, kind, tolerance):
    config = dataclasses.replace(train.standard_config(TWO_BLOCKS), init_from=str(GOLDEN))
    training = train.TrainingConfig(mode="standard", quantization_type=kind)
    (stage,) = train.fusion_schedule(config, training)
    model, (_, tensors) = GPT(config, blocks=0), read_pretrained(GOLDEN, config)
    train.begin_stage(model, stage, training, tensors, tmp_path)
    idx = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(1))
    reference = GPT.from_pretrained(GOLDEN)
    before = next_token_loss(reference, idx).item()
    # int4 moves the loss of 6.7 by 0.01 to 0.03
    assert next_token_loss(model, idx).item() == pytest.approx(before, abs=tolerance)
    backup = quant.read_backup(tmp_path / "backup", 0)
    assert all(torch.equal(tensor, reference.get_parameter(n)) for n, tensor in backup.items())
    assert len(backup) == len(list(reference.parameters()))


def test_plain_qlora(toy, ended, tmp_path, monkeypatch, capsys):
    """A run from the weights of another: it goes on from there, what is frozen stays, and rebuilt
    from disk, resumed or exported it is the model that was trained."""
    small = {"model__n_layers": 3, "training__block_size": 1, "training__checkpoint_interval": 4}
    learn = {"training__max_steps": 60, "training__lr": "3e-3", "training__run_id": "source"}
    ended(toy(**NEXT_TOKEN, **small, **learn, training__eval_interval=60))
    folder = tmp_path / "hf"
    assert evaluate(toy, "--run", "source", "--precision", "fp32", "--export", folder) == 0
    plain = small | {"training__mode": "standard", "model__init_from": folder,
                     "training__qlora_dropout": 0.1, "training__quantization_type": "int4",
                     "training__qlora_lr": "1e-2", "training__max_steps": 24}  # fmt: skip
    capsys.readouterr()
    model = ended(toy(**plain))
    printed = capsys.readouterr().out
    assert "plain QLoRA" in printed and "no effect" not in printed
    losses = evaluate_gpt2.read_metrics(toy.folder, "validation")
    losses = [line["cross_entropy"] for line in losses]
    assert losses[-1] < losses[0] - 0.04
    # What is frozen is what the file holds, bit for bit; what is trained has moved.
    frozen = GPT.from_pretrained(folder, model.config).eval()
    quant.freeze_block(frozen, 0, "int4")
    state = {n.replace(".base.", "."): t for n, t in model.state_dict().items()}
    for name, tensor in frozen.state_dict().items():
        assert torch.equal(state[name], tensor) != name.startswith("exit_norms"), name
    assert not torch.equal(model.mask_row, frozen.wte.weight[257].float())
    # What training held: no gradient and no AdamW state but of adapters, exit norm, [MASK] row.
    (stage,) = evaluate_gpt2.read_metrics(toy.folder, "stage")
    held, d, rank = stage["held"], 32, 8
    assert held["adapters"] == 4 * 3 * 16 * d * rank
    assert held["gradients"] == held["adapters"] + 4 * 3 * d
    assert held["optimizer"] == 2 * held["gradients"] + 4 * (3 * 8 + 3)  # and a step count each
    # From disk, in its own storage the same model, and in every other.
    loaded = evaluate_gpt2.load_run(toy.folder).eval()
    idx = torch.randint(258, (2, 32))  # with [MASK]
    assert same(loaded, model) and torch.equal(loaded(idx), model(idx))
    exact = next_token_loss(model, idx % 257).item()  # of noise: 7.8; nf4 gives 0.09 more
    for kind in quant.KINDS:
        other = evaluate_gpt2.load_run(toy.folder, kind).eval()
        assert next_token_loss(other, idx % 257).item() == pytest.approx(exact, abs=0.2), kind
    # Out again: the same logits, of text.
    assert evaluate(toy, "--run", "toy", "--export", tmp_path / "out") == 0
    exported = GPT.from_pretrained(tmp_path / "out")(idx % 257)[..., :257]
    torch.testing.assert_close(exported, model(idx % 257)[..., :257], atol=1e-4, rtol=1e-4)
    # Killed one step after a checkpoint, and resumed: the same model.
    real, count = train.train_step, [0]

    class Killed(Exception):
        pass

    def step_then_die(*args):
        count[0] += 1
        if count[0] == 6:
            raise Killed
        return real(*args)

    monkeypatch.setattr(train, "train_step", step_then_die)
    stopped = toy(**plain, training__run_id="stopped")
    with pytest.raises(Killed):
        train.main(stopped)
    monkeypatch.setattr(train, "train_step", real)
    assert same(ended([*stopped, "--resume"]), model)


def test_the_schedule_and_the_flops_of_plain_qlora():
    """Only from pretrained weights; FLOPs as torch counts them, the adapters' own left out."""
    from torch.utils.flop_counter import FlopCounterMode

    def schedule(init_from, **changes):
        config = dataclasses.replace(TWO_BLOCKS, init_from=init_from)
        training = train.TrainingConfig(mode="standard", qlora_rank=1, compute_type="fp32",
                                        **changes)  # fmt: skip
        return train.fusion_schedule(train.standard_config(config), training)[0], training

    stage, training = schedule("folder")
    assert (stage.plain, stage.adapters, stage.layers, stage.embeddings) == (True, True, (), False)
    for other in (schedule("scratch"), schedule("folder", qlora_enabled=False)):
        assert other[0].layers == (0, 1) and other[0].embeddings and not other[0].adapters
    model = GPT(train.standard_config(TWO_BLOCKS))
    quant.freeze_block(model, 0, "int4")
    optimizer = train.begin_stage(model, stage, training)
    tokens = torch.randint(61, (5000,)).numpy().astype("uint16")
    batch = train.batch_of(tokens, model.config, training, stage, 0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with FlopCounterMode(display=False) as counter:
        train.train_step(train.stage_loss(model, stage), optimizer, scaler, batch, training,
                         torch.device("cpu"), torch.float32)
    adapters = 6 * 2 * 16 * 32  # of rank 1, on two layers: both factors, forward and backward
    n_tokens = batch[0].numel()
    # The head scores 15 positions of 16.
    expected = train.matmul_flops(stage, model.config) - 4 * 32 * 64 / 16 + adapters
    assert counter.get_total_flops() / n_tokens == pytest.approx(expected, rel=1e-3)


def test_export_refuses_what_the_layout_cannot_hold(toy, ended, tmp_path, capsys):
    target = tmp_path / "out"
    ended(toy(model__attention_mode="bidirectional", training__max_steps=4))
    for options, words in (
        (["--export", target], "causal"),
        (["--export", target, "--precision", "all"], "one precision"),
        (["--export", toy.folder], "new folder"),
    ):
        assert evaluate(toy, "--run", "toy", *options) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
        assert not target.exists()


def test_a_fused_run_is_exported_at_its_last_exit(toy, ended, tmp_path, capsys):
    ended(toy(training__max_steps=20, training__lr="3e-3", training__qlora_lr="3e-2"))
    idx, model = torch.randint(257, (2, 32)), evaluate_gpt2.load_run(toy.folder, "fp32").eval()
    expected = model(idx)[..., :257]
    for precision, dtype, atol in (("fp32", torch.float32, 1e-5), ("fp16", torch.float16, 1e-2)):
        folder = tmp_path / precision
        assert evaluate(toy, "--run", "toy", "--precision", precision, "--export", folder) == 0
        assert "lost: exits 0 to 1 and the [MASK] row" in capsys.readouterr().out
        tensors = read_safetensors(folder / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        ours = GPT.from_pretrained(folder)(idx)[..., :257]
        torch.testing.assert_close(ours, expected, atol=atol, rtol=0)
    for parameter in lora.adapter_parameters(model, 2).values():
        parameter.data.zero_()
    assert (model(idx)[..., :257] - expected).abs().max() > 1e-2  # or merging proved nothing


def test_weights_with_outliers_in_every_storage(toy, ended, tmp_path, monkeypatch, capsys):
    """Weights that were never trained here, with a few columns of 50 sigma, as GPT-2 has them."""
    ended(toy(training__max_steps=4))
    monkeypatch.chdir(tmp_path)  # where data/ is
    config = dataclasses.replace(TWO_BLOCKS, vocab_size=257, d_model=128, seq_len=32)
    figures = {}
    for name, size in (("plain", 1), ("outliers", 50)):
        torch.manual_seed(0)
        model = GPT(config)
        for layer in model.h:
            for linear in (layer.attn.c_attn, layer.mlp.c_fc):
                linear.weight.data[:, [3, 70]] *= size
        model.save_pretrained(name)
        capsys.readouterr()
        assert evaluate(toy, "--run", name, "--precision", "all") == 0
        assert "exact" in capsys.readouterr().out
        figures[name] = json.loads(Path(name, "eval_all.json").read_text())
        assert evaluate(toy, "--run", name) == 2  # a table of storages is all there is
        assert "--precision all" in capsys.readouterr().err
    for table in figures.values():
        assert list(table) == list(quant.KINDS)
        for kind, row in table.items():
            assert 5 < row["left_to_right"][0] < 8, kind
            assert row["nelbo_12"] is None
        assert table["fp32"]["signal_to_noise_db"] is None
        assert table["fp16"]["signal_to_noise_db"] > 70
        assert abs(table["fp16"]["to_fp32"]) < 1e-3
        assert 0 < abs(table["int4"]["to_fp32"]) < 0.1 and abs(table["nf4"]["to_fp32"]) < 0.1
    # Measured: an outlier takes int4's range from its whole group, nf4's scale likewise.
    expected = {"int4": (20.95, 15.15), "nf4": (20.72, 18.60)}
    for kind, pair in expected.items():
        for table, db in zip(figures.values(), pair):
            assert table[kind]["signal_to_noise_db"] == pytest.approx(db, abs=0.3)
    model.h[1].mlp.c_fc.weight.data[0, 0] = 1e5
    model.save_pretrained("large")
    assert evaluate(toy, "--run", "large/model.safetensors", "--precision", "all") == 2
    assert "mlp.c_fc: weight (512, 128) has values up to 1e+05, too large for fp16" in (
        capsys.readouterr().err
    )
    Path("plain", "model.safetensors").write_bytes(b"nothing")
    assert evaluate(toy, "--run", "plain", "--precision", "all") == 2
    assert "truncated" in capsys.readouterr().err


def test_loading_a_block_is_strict():
    config, training = TWO_BLOCKS, dict(qlora_rank=2, qlora_alpha=4, qlora_dropout=0.0)
    source = GPT(config)
    lora.add_adapters(source, 1, 2, 4)
    whole = source.block_parameters(1) | lora.adapter_parameters(source, 1)
    name = "h.0.attn.c_attn.lora_A.1"
    assert name in whole
    less = {n: t for n, t in whole.items() if n != name}
    more, other = whole | {"extra": torch.zeros(1)}, whole | {name: torch.zeros(8, 32)}
    for state in (whole, less, more, other):
        model = GPT(config)
        if state is whole:
            evaluate_gpt2.load_blocks(model, [1], state, 1, training)
            assert torch.equal(model.get_parameter(name), whole[name])
            continue
        with pytest.raises(UserError, match=f"do not fit config.json: ({name}|extra)"):
            evaluate_gpt2.load_blocks(model, [1], state, 1, training)


# ---------------------------------------------------------------------------------------- live


@pytest.mark.parametrize(
    "vocab_size, n_embd, n_layer, n_head", [(61, 32, 2, 4), (1000, 96, 5, 3), (257, 256, 1, 16)]
)
def test_live_against_transformers(tmp_path, vocab_size, n_embd, n_layer, n_head):
    transformers = pytest.importorskip("transformers")
    reference = reference_model(
        7, 1024, vocab_size=vocab_size, n_embd=n_embd, n_layer=n_layer, n_head=n_head
    )
    reference.save_pretrained(tmp_path / "theirs")
    model = GPT.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert back.dtype == torch.float32
    generator = torch.Generator().manual_seed(3)
    for T in (1, 7, 1024):
        idx = torch.randint(0, vocab_size, (2, T), generator=generator)
        out = reference(idx, labels=idx if T > 1 else None)
        if T > 1:
            reference.zero_grad()
            out.loss.backward()
        grads = {name: p.grad for name, p in reference.transformer.named_parameters()}
        compare(model, idx, out.logits.detach(), out.loss, grads if T > 1 else {})
        assert torch.equal(back(idx).logits, out.logits)
