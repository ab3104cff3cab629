"""Train GPT-2 as a mask-diffusion model, one block of layers after another.

    python train_gpt2_fusion.py --preset tiny               three minutes on two CPU cores
    python train_gpt2_fusion.py                             GPT-2 Small, gpt2.yaml as it stands
    python train_gpt2_fusion.py --resume tiny               go on where the run was stopped
    python train_gpt2_fusion.py training.mode=standard      end to end: the control
    torchrun --nproc-per-node=2 train_gpt2_fusion.py        the same run on two processes

Read from top to bottom:

1. `Stage`, `fusion_schedule`              which layers are trained when, on which noise
2. `begin_stage`, `store_blocks`           freeze and adapt; back up, then convert
3. `train`, `train_stage`, `train_step`    the stages, the loop, one step
4. `log_steps`, `validate`, `print_plan`   what the loop tells
5. `State`, `save_run`, `load_run`         a run's weights on disk and back
6. `start_processes`, `stage_loss`         more than one process: DistributedDataParallel
7. `AdamWInBf16`, `memory`                 what training holds
8. `main`                                  a run's beginning and end
"""

import contextlib
import ctypes
import importlib.util
import math
import os
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lora
import quant
from data_loader import (DEFAULTS, Config, Parser, Run, UserError, load_config, load_tokens,
                         one_line_errors, read_tensors, rows_in, training_rows,
                         validation_rows, write_tensors)
from model import (GPT, compute_type, corrupt, diffusion_loss, noise_of_rows, pick_device,
                   read_pretrained, score, stratified, usable)

MIB = 2**20

# ---------------------------------------------------------------------------------------------
# 1. The schedule: which layers are trained when, on which noise


@dataclass(frozen=True)
class Stage:
    """The training of one block. Stages count like blocks, from 0."""

    block: int  # its exit is read; the forward pass stops after this block
    steps: int
    time_steps: tuple[float, ...]  # mask fractions; (0.0,) is next-token training
    trained: tuple[int, ...]  # layers, in fp32
    embeddings: bool  # trained too
    adapted: tuple[int, ...]  # frozen layers, whose linears get LoRA adapters for this exit
    stored: tuple[int, ...]  # blocks that are backed up and converted when the stage ends
    plain_qlora: bool = False  # block 0 is backed up and converted before the first step


def fusion_schedule(config):
    """The list of stages; the training only walks it.

    frozen: stage k trains the layers of block k on block k's band, the blocks before it are frozen
    (and adapted, if qlora_enabled). trainable: stage k trains every layer up to block k and the
    embeddings. Standard mode has one block, hence one stage; from pretrained weights and with
    qlora_enabled that stage is plain QLoRA: adapters, exit norm and [MASK] row over frozen layers.
    """
    blocks, size = config.total_blocks, config.block_size
    frozen = config.fusion_mode == "frozen"
    plain = config.mode == "standard" and config.qlora_enabled and config.init_from != "scratch"
    shares = config.block_steps[:blocks]
    # Rounding the running sum, not each share, makes the steps add up to max_steps exactly.
    edges = [round(config.max_steps * sum(shares[:k]) / sum(shares)) for k in range(blocks + 1)]
    stages = []
    for k in range(blocks):
        before, own = tuple(range(k * size)), tuple(range(k * size, (k + 1) * size))
        if plain:
            trained, adapted, stored = (), own, ()
        elif frozen:
            trained, adapted, stored = own, before, (k,)
        else:  # all are stored at the end
            trained, adapted = before + own, ()
            stored = tuple(range(blocks)) if k == blocks - 1 else ()
        stages.append(Stage(
            block=k,
            steps=edges[k + 1] - edges[k],
            time_steps=config.time_steps_of(k) if config.time_step_masking else (0.0,),
            trained=trained,
            embeddings=(k == 0 or not frozen) and not plain,
            adapted=adapted if config.qlora_enabled else (),
            stored=stored,
            plain_qlora=plain,
        ))  # fmt: skip
    if config.max_steps and min(stage.steps for stage in stages) < 1:
        raise UserError(f"training.max_steps={config.max_steps} leaves a block without a step; "
                        "give more")
    return stages


def learning_rate_share(step, stage, config):
    """Linear warm-up, then cosine decay to lr_min_share, within the stage. -> (0, 1]"""
    warmup = min(config.warmup_steps, stage.steps // 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (stage.steps - warmup)
    low = config.lr_min_share
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------
# 2. Beginning and ending a stage


def add_block(model, pretrained=None):
    """Append the next block, with fresh weights or with those of `model.read_pretrained`, which
    are taken out of `pretrained`, so that the mapped file is let go when all are used."""
    # A block's layers start as a function of (seed, block) alone, whatever ran before.
    torch.manual_seed(1000 * model.config.seed + 1 + model.blocks)
    model.grow()
    if pretrained:
        names = model.block_parameters(model.blocks - 1)
        model.load_state_dict({name: pretrained.pop(name) for name in names}, strict=False)


def begin_stage(model, stage):
    """Add the stage's adapters, unless they are there, and mark what it trains.

    Returns:
        the AdamW optimizer over the stage's trainable parameters.
    """
    config = model.config
    if stage.adapted and not lora.adapter_parameters(model, stage.block):
        lora.add_adapters(model, stage.block, stage.adapted)
    if stage.plain_qlora and model.mask_row is None:
        model.add_mask_row()
    exit_norm = [*model.exit_norms[stage.block].parameters()]
    at_qlora_lr = [*lora.adapter_parameters(model, stage.block).values()]
    if stage.plain_qlora:
        at_lr, at_qlora_lr = [], [model.mask_row, *at_qlora_lr, *exit_norm]
    else:
        at_lr = exit_norm + [p for i in stage.trained for p in model.h[i].parameters()]
        at_lr += [model.wte.weight, model.wpe.weight] if stage.embeddings else []
    model.requires_grad_(False)
    for parameter in at_lr + at_qlora_lr:
        parameter.requires_grad_(True)
    set_dropout(model, stage)
    groups = [
        # Biases and LayerNorms are not decayed (as in GPT, Radford et al. 2018).
        {"params": [p for p in at_lr if p.dim() == 2], "lr": config.lr},
        {"params": [p for p in at_lr if p.dim() < 2], "lr": config.lr, "weight_decay": 0.0},
        {"params": at_qlora_lr, "lr": config.qlora_lr, "weight_decay": 0.0},
    ]
    groups = [group | {"peak_lr": group["lr"]} for group in groups if group["params"]]
    if compiles(model):
        torch.compiler.reset()  # dynamo keeps 8 graphs of a function; this stage's are others
        for layer in model.h:
            layer.compile()
    kind = AdamWInBf16 if config.moments == "bf16" else torch.optim.AdamW
    return kind(groups, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True)


def compiles(model):
    """Whether torch.compile makes kernels of each layer. auto: on a GPU where Triton is there."""
    if model.config.compile == "auto":
        return model.wte.weight.is_cuda and importlib.util.find_spec("triton") is not None
    return model.config.compile == "true"


def set_dropout(model, stage):
    """Dropout on in what the stage trains; frozen layers run without."""
    model.eval()
    for i in stage.trained:
        model.h[i].train()
    model.dropout.train(stage.embeddings)
    for module in model.modules():
        if isinstance(module, lora.LoRALinear):
            module.dropout.train(bool(stage.adapted))


def store_blocks(run, state, model, blocks):
    """Back up each block, its weights and its exit's adapters, verified on disk, then convert it.

    From here on no stage changes what their exits compute, not by one bit: what is stored has no
    gradient, `begin_stage` trains only the new block, its exit norm and its adapters, the forward
    pass to exit k stops after block k (`GPT.hidden`), and there only adapters k act
    (`GPT.choose_adapters`).
    """
    for block in blocks:
        tensors = model.block_parameters(block) | lora.adapter_parameters(model, block)
        seal = write_finite(run.backup(block), tensors, state) if rank() == 0 else ""
        state.backups.append(seal)
        wait_for_all()  # no process converts before the backup is on disk
        quant.freeze_block(model, block, state.config.quantization_type)
        model.requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# 3. The stages, the loop, one step


def train(run, state, model, optimizer_tensors, tokens, val_rows, pretrained, signals):
    """Train all stages, or what the state leaves of them; return early if asked to stop.

    Between two stages, `fusion_mode: frozen`. On disk: the backup of the block, a line in
    metrics.jsonl, a checkpoint that holds no weights but the seals of all backups. In memory: the
    optimizer goes, the block becomes codes, the next block is appended and trained with adapters
    on those before.

    Args:
        optimizer_tensors: {name: tensor} from `load_run`, in the middle of a stage.
        pretrained: from `read_pretrained`, or None. signals: the list of `noted_signals`.
    """
    config, device = state.config, model.wte.weight.device
    stages = fusion_schedule(config)
    for stage in stages[state.stage :]:
        keep_freed_memory(return_now=True)  # what only the stage before has used
        while model.blocks <= stage.block:
            add_block(model, pretrained)
        if stage.plain_qlora and not state.backups:
            store_blocks(run, state, model, [0])
        optimizer = begin_stage(model, stage)
        load_optimizer(optimizer, model, optimizer_tensors)
        memory_mib(device, reset=True)
        if not train_stage(run, state, model, optimizer, stage, tokens, val_rows, signals):
            return
        held = memory(model, optimizer)
        del optimizer  # its moments are as large as what was trained, in fp32 twice that
        store_blocks(run, state, model, stage.stored)
        watch_peak(state, device)
        record(run, "stage", stage=stage.block, steps=stage.steps, seconds=state.seconds,
               tokens=stage.steps * tokens_per_step(config), **held,
               peak_mib=state.peak_mib or None)  # fmt: skip
        stored = (f"backed up, verified, and now stored in {config.quantization_type}: "
                  f"{len(state.backups)} of {config.total_blocks} blocks\n")
        say(stored if stage.stored else "")
        state.stage, state.step, state.scaler = stage.block + 1, 0, {}
        state.seconds = state.peak_mib = 0.0
        save_run(run, state, model)
        if state.stage < len(stages) and in_any_process(signals):
            return


def train_stage(run, state, model, optimizer, stage, tokens, val_rows, signals):
    """The loop of one stage. -> False if it was stopped before its last step"""
    config, device = state.config, model.wte.weight.device
    loss_of = stage_loss(model, stage)
    in_fp16 = compute_type(device, config.compute_type) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=in_fp16)  # scales in fp16 only
    if state.scaler:
        scaler.load_state_dict(state.scaler)
    steps, since = [], time.perf_counter()  # the last log line
    saved = time.monotonic()
    while state.step < stage.steps:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_share(state.step, stage, config)
        batch = batch_of(tokens, config, stage, state.step)
        seed_dropout(config, stage, state.step)
        ce, grad_norm = train_step(loss_of, optimizer, scaler, batch, config, device)
        state.step += 1
        steps.append((batch[3], ce, grad_norm))

        last = state.step == stage.steps  # saved with the end of the stage
        stop = in_any_process(signals) and not last
        may_save = stop or (state.step % config.checkpoint_interval == 0 and not last)
        validates = last or state.step % config.eval_interval == 0
        if may_save or validates or state.step % config.log_interval == 0:
            line = log_steps(run, state, stage, optimizer, scaler, steps, since)
            say(line + (validate(run, state, model, stage, val_rows) if validates else ""))
            due = time.monotonic() - saved >= config.checkpoint_seconds
            if may_save and in_any_process(stop or due):
                state.scaler = scaler.state_dict()
                watch_peak(state, device)
                save_run(run, state, model, optimizer)
                wait_for_all()  # for the checkpoint of process 0
                saved = time.monotonic()
            if stop:
                return False
            steps, since = [], time.perf_counter()
    return True


def batch_of(tokens, config, stage, step):
    """The global batch of one step: a pure function of (seed, stage, step).

    Returns:
        x_0, x_t, mask, each (B, T), and mask_fraction (B,).
    """
    rows = config.batch_size * config.gradient_accumulation
    x_0 = training_rows(tokens, config.seq_len, rows, config.seed, stage.block, step)
    rng = np.random.default_rng([config.seed, stage.block, step, 1])
    mask_fraction = stratified(stage.time_steps, rows, int(rng.integers(len(stage.time_steps))))
    noise = torch.from_numpy(rng.random(x_0.shape, dtype=np.float32))  # (B, T)
    x_t, mask = corrupt(x_0, mask_fraction, noise, config.mask_id)
    return x_0, x_t, mask, mask_fraction


def train_step(loss_of, optimizer, scaler, batch, config, device):
    """Forward, backward, clip, update, on this process's slice of the batch.

    Args:
        loss_of: from `stage_loss`; batch: from `batch_of`, the same in every process.

    Returns:
        CE estimates of the slice's rows (B,) and the gradient norm before clipping, on the device.
    """
    here = slice_of(batch)
    batch = to_device(here, device)
    rows, by_row = len(batch[0]), []
    for i in range(0, rows, config.batch_size):  # gradient accumulation
        micro = [t[i : i + config.batch_size] for t in batch]
        n_masked = int(here[2][i : i + config.batch_size, 1:].sum())
        last = i + config.batch_size >= rows  # with it gradients are averaged over processes
        with contextlib.nullcontext() if last or world_size() == 1 else loss_of.no_sync():
            loss, ce, _ = loss_of(*micro, rows=rows, n_masked=n_masked)
            scaler.scale(loss).backward()
        by_row.append(ce)
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(trained, config.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat(by_row), grad_norm


def seed_dropout(config, stage, step):
    """Make the masks of dropout a function of (seed, stage, step, process)."""
    numbers = (config.seed, stage.block, step, rank())
    torch.manual_seed(hash(numbers))  # the hash of integers is the same everywhere


def tokens_per_step(config):
    """Tokens of one optimizer step: rows times context length."""
    return config.batch_size * config.gradient_accumulation * config.seq_len


# ---------------------------------------------------------------------------------------------
# 4. What the loop tells


def log_steps(run, state, stage, optimizer, scaler, steps, since):
    """Record (mask fraction by row, CE by row, gradient norm) of the steps since the last log line.
    -> the line

    UserError names the first of them whose loss or gradient is not finite. A loss scaler (fp16)
    expects gradients to overflow now and then: it skips such a step and halves its scale, at first
    65,536. Below 2^-24, fp16's smallest number, gradients that do not overflow would vanish.
    """
    config, by_time_step = state.config, defaultdict(list)
    for number, (mask_fraction, ce, grad_norm) in enumerate(steps, state.step + 1 - len(steps)):
        ce = gathered(ce)
        if not (ce.isfinite().all() and (scaler.is_enabled() or grad_norm.isfinite())):
            raise UserError(f"stage {stage.block}, step {number}: the loss is {ce.mean().item()}, "
                            f"the gradient norm {grad_norm.item()}; lower training.lr or qlora_lr")
        for m, value in zip(mask_fraction.tolist(), ce.tolist()):
            by_time_step[m].append(value)
    if scaler.get_scale() < 2.0**-24:
        raise UserError(f"stage {stage.block}, step {state.step}: the gradients overflow fp16, and "
                        "step after step is skipped; begin again with training.compute_type=fp32 "
                        "(or bf16), or with a lower training.lr or qlora_lr")
    skipped = not any(grad_norm.isfinite() for _, _, grad_norm in steps)
    memory_now, _ = memory_mib(steps[-1][2].device)
    figures = {
        "loss": float(np.mean([value for values in by_time_step.values() for value in values])),
        "loss_by_time_step": {f"{m:g}": np.mean(by_time_step[m]) for m in sorted(by_time_step)},
        "lr": optimizer.param_groups[0]["lr"],
        "grad_norm": steps[-1][2].item(),
        "memory_mib": memory_now,
    }
    seconds = time.perf_counter() - since  # read here, where a GPU has ended its work
    speed = len(steps) * tokens_per_step(config) / seconds
    state.seconds += seconds
    record(run, "step", stage=stage.block, step=state.step, **figures, tokens_per_second=speed)
    left = sum(s.steps for s in fusion_schedule(config)[stage.block :]) - state.step
    return (f"stage {stage.block}  step {state.step:5d}/{stage.steps}  loss {figures['loss']:.4f}  "
            f"{speed:7,.0f} tokens/s  {cell(memory_now, '6,.0f')} MiB  "
            f"eta {left * tokens_per_step(config) / speed / 60:.1f} min"
            + "  all skipped: the gradients overflow fp16" * skipped)


def validate(run, state, model, stage, val_rows):
    """Record mean CE over the stage's time steps, on fixed validation rows. -> words on it"""
    noise = noise_of_rows(len(val_rows), val_rows.size(1), state.config.seed)
    model.eval()
    scores = [score(model, val_rows, torch.full((len(val_rows),), m), stage.block, noise,
                    batch_size=state.config.batch_size) for m in stage.time_steps]  # fmt: skip
    set_dropout(model, stage)
    ce, accuracy = (torch.stack([of_m.mean() for of_m in part]).mean().item()
                    for part in zip(*scores))  # fmt: skip
    record(run, "validation", stage=stage.block, step=state.step, cross_entropy=ce,
           perplexity=perplexity(ce), accuracy=accuracy)
    return f"  validation {ce:.4f}"


def record(run, event, **values):
    if rank() == 0:
        run.record(event, **values)


def say(text=""):
    """Print at once, also into a pipe or a log file; process 0 alone speaks."""
    if rank() == 0:
        with contextlib.suppress(OSError):  # nobody reads on; the training goes on
            print(text, flush=True)


def perplexity(nats):
    """exp of a loss, as far as a float reaches."""
    return math.exp(min(nats, 700))


def cell(value, spec):
    """A value as text, "-" for None."""
    return "-" if value is None else format(value, spec)


def print_table(columns, rows):
    """Print dicts as a table; columns is {key: format}. Text stands left, numbers right."""
    lines = [[*columns]]
    lines += [[cell(row.get(key), spec) for key, spec in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = [">" if spec else "<" for spec in columns.values()]
    for line in lines:
        say("  ".join(f"{text:{side}{width}}"
                      for text, side, width in zip(line, sides, widths)).rstrip())  # fmt: skip


def stages_of(run):
    """What each stage took and held, from metrics.jsonl."""
    return run.metrics("stage", "stage", "steps", "seconds", "tokens", "weights_mib",
                       "gradients_mib", "optimizer_mib", "peak_mib")  # fmt: skip


def print_stages(run):
    """`stages_of` a run as a table."""
    held = ("weights_mib", "gradients_mib", "optimizer_mib")
    rows = [stage | {"held_mib": sum(stage[kind] for kind in held)} for stage in stages_of(run)]
    print_table({"stage": "d", "steps": "d", "seconds": ".0f", "tokens": ",",
                 **dict.fromkeys([*held, "held_mib"], ".1f"), "peak_mib": ".0f"}, rows)
    say("held: weights, gradients, optimizer state; peak: the whole process, or a GPU's tensors")


def print_plan(run, config, device, n_tokens):
    """Say what is about to be done."""
    dtype = str(compute_type(device, config.compute_type)).removeprefix("torch.")
    passes = config.max_steps * tokens_per_step(config) / config.seq_len
    passes /= rows_in(n_tokens, config.seq_len)
    where = str(device) if world_size() == 1 else f"{world_size()} x {device.type}"
    say(f"run {run.name}: {kind_of_run(config)}, {config.attention_mode}; {config.n_layers} layers "
        f"of {config.d_model}, context {config.seq_len}, vocabulary {config.vocab_size}\n"
        f"{config.max_steps} steps of {tokens_per_step(config):,} tokens, {passes:.2g} passes over "
        f"{config.source}; on {where}, products in {dtype}\n")
    rows = []
    for stage in fusion_schedule(config):
        layers, adapted = stage.trained, stage.adapted
        what = [f"layers {layers[0]}-{layers[-1]}" if layers else "exit norm, [MASK] row"]
        what += ["embeddings"] if stage.embeddings else []
        what += [f"adapters on layers {adapted[0]}-{adapted[-1]}"] if adapted else []
        rows.append({"stage": stage.block, "steps": stage.steps,
                     "mask fractions": " ".join(f"{m:g}" for m in stage.time_steps),
                     "trained": ", ".join(what)})  # fmt: skip
    print_table({"stage": "d", "steps": "d", "mask fractions": "", "trained": ""}, rows)
    say()


def kind_of_run(config):
    """A few words on how a run is trained."""
    if fusion_schedule(config)[0].plain_qlora:
        return f"plain QLoRA in {config.quantization_type}"
    if not config.time_step_masking:
        return "next-token"
    return f"fused, {config.fusion_mode}" if config.mode == "fused" else "end-to-end diffusion"


# ---------------------------------------------------------------------------------------------
# 5. A run's weights on disk and back


@dataclass
class State:
    """Where a run stands: what a checkpoint says beside its tensors."""

    config: Config
    tokens_sha256: str  # of the training text
    stage: int = 0  # in training; the number of stages when all are done
    step: int = 0  # steps done in that stage
    blocks: int = 0  # that exist
    backups: list = field(default_factory=list)  # seals of the backups of blocks 0, 1, ...
    metrics_bytes: int = 0  # size of metrics.jsonl
    scaler: dict = field(default_factory=dict)  # of the loss, with fp16 products
    seconds: float = 0.0  # training time of the stage so far, validation and saving left out
    peak_mib: float = 0.0

    @property
    def finished(self):
        return self.stage == self.config.total_blocks

    def facts(self):
        """What stands in a file, as JSON can hold it."""
        return vars(self) | {"config": vars(self.config)}


def save_run(run, state, model=None, optimizer=None):
    """Write the checkpoint: all that resuming needs beside the backups.

    Args:
        model: None at the beginning of a run; optimizer: None at the beginning of a stage.
    """
    if rank():
        return
    tensors = {}
    if model:
        state.blocks = model.blocks
        tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for block in range(len(state.backups), model.blocks):
            tensors |= model.block_parameters(block)
        for name, p in model.named_parameters() if optimizer else ():
            kept = optimizer.state.get(p, {})
            tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in kept.items()}
    with open(run.metrics_file, "ab") as file:
        os.fsync(file.fileno())  # the lines must be on disk before what counts them
        state.metrics_bytes = file.tell()
    (run.folder / "eval.json").unlink(missing_ok=True)  # it was of the model before this
    write_finite(run.checkpoint, tensors, state)


def write_finite(path, tensors, state):
    """`write_tensors`, with the state. UserError, and the old file stays, if any is not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"stage {state.stage}, step {state.step}: {name} is not finite; {path} "
                            "is as it was; lower training.lr or qlora_lr")
    return write_tensors(path, tensors, state.facts())


def read_checkpoint(run):
    """(State, tensors) of a run's last checkpoint, from one reading of the file."""
    tensors, facts, _ = read_tensors(run.checkpoint)
    try:
        return State(**facts | {"config": Config(facts["config"])}), tensors
    except (KeyError, TypeError) as error:
        raise UserError(f"{run.checkpoint}: of another version of this code ({error})") from None


def load_run(run, device="cpu", kind=None, checkpoint=None):
    """Rebuild a run as of its last checkpoint: the only way to a run's model.

    First the checkpoint is read (by --resume it has been), for the state; then each finished
    block's backup, whose seal the state knows, and the block is stored in `kind` (None: the run's
    own quantization_type); last come, from the checkpoint, the blocks in training, in fp32, and the
    optimizer. A run that has just begun has only a state. Training goes on to the same bits on a
    CPU; a GPU adds some gradients in no fixed order.

    Args:
        checkpoint: (State, tensors) where they have been read already.

    Returns:
        model, State, {name: optimizer tensor}. UserError names the file that is wrong.
    """
    state, tensors = checkpoint or read_checkpoint(run)
    config = state.config
    if not (checkpoint or state.blocks) or (kind and not state.finished):
        raise UserError(f"run {run.name} has not ended, this needs more of it: --resume {run}")
    torch.manual_seed(1000 * config.seed)  # the embeddings'; the blocks' follow in `add_block`
    model = GPT(config, blocks=0)
    for block, seal in enumerate(state.backups):
        path = run.backup(block)
        stored, _, found = read_tensors(path)
        if found != seal:
            raise UserError(f"{path} is not the one that {run.checkpoint} counts on; put that back")
        model.grow()
        fill(model, stored, [block], path)
        quant.freeze_block(model, block, kind or config.quantization_type)
    unfinished = range(model.blocks, state.blocks)
    for _ in unfinished:
        model.grow()
    optimizer = {name.removeprefix("optimizer."): tensors.pop(name)
                 for name in [*tensors] if name.startswith("optimizer.")}  # fmt: skip
    fill(model, tensors, unfinished, run.checkpoint)
    tensors.clear()  # views of the file: while one is left, all of it counts as memory
    return model.to(device), state, optimizer


def fill(model, tensors, blocks, path):
    """Fill `blocks` from tensors by name, adapters and [MASK] row too where there are any.

    UserError where one is missing, unknown or of another shape; `load_state_dict(strict=False)`
    alone would say nothing, as the other blocks are not in this file.
    """
    needed = {name for block in blocks for name in model.block_parameters(block)}
    for stage in fusion_schedule(model.config):
        if any(name.endswith(f".lora_A.{stage.block}") for name in tensors):
            lora.add_adapters(model, stage.block, stage.adapted)
            needed |= lora.adapter_parameters(model, stage.block).keys()
    if "mask_row" in tensors:
        model.add_mask_row()
    try:
        unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
        if unknown or needed - tensors.keys():
            raise RuntimeError(f"unknown {unknown}, missing {needed - tensors.keys()}")
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its configuration: {error!s:.300}") from None


def load_optimizer(optimizer, model, tensors):
    """Copy the state that `load_run` read, {parameter's name.key: tensor}, into an optimizer."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        p = parameters[owner]
        optimizer.state[p][key] = tensor.to(p.device, copy=True)
    tensors.clear()  # the next stage has a state of its own; and these are views of the file


# ---------------------------------------------------------------------------------------------
# 6. More than one process: torchrun starts them, each takes a slice of every batch


def start_processes(device):
    """Join the processes that torchrun started, if it did. -> this process's device."""
    if not dist.is_torchelastic_launched():
        return device
    if device.type == "cuda":
        device = pick_device(f'cuda:{os.environ["LOCAL_RANK"]}')  # UserError: fewer GPUs
        torch.cuda.set_device(device)
    # gloo carries what lives on the CPU: asking whether to stop need not wait for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def rank():
    """Number of this process. Process 0 writes all files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all():
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def gathered(values):
    """The values of all processes, in their order: (n,) each -> (world_size * n,)."""
    if not dist.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def in_any_process(flag):
    """Whether `flag` is true here or in another process: all stop, or save, at the same step."""
    return bool(gathered(torch.tensor([bool(flag)])).any())


def slice_of(batch):
    """This process's rows of a batch."""
    rows = len(batch[0]) // world_size()
    return [t[rank() * rows : (rank() + 1) * rows] for t in batch]


def to_device(batch, device):
    """A batch on the device; a GPU fetches it while the CPU goes on."""
    if device.type == "cuda":
        batch = [t.pin_memory() for t in batch]
    return [t.to(device, non_blocking=True) for t in batch]


class StageLoss(nn.Module):
    """`diffusion_loss` of a stage as a module, which DistributedDataParallel asks for."""

    def __init__(self, model, stage):
        super().__init__()
        self.model, self.exit_k = model, stage.block

    def forward(self, x_0, x_t, mask, mask_fraction, rows, n_masked):
        return diffusion_loss(self.model, x_0, x_t, mask, mask_fraction, self.exit_k, rows,
                              n_masked)  # fmt: skip


def stage_loss(model, stage):
    """The StageLoss; with several processes, one whose backward averages the trainable
    parameters' gradients over them (frozen ones have none)."""
    loss = StageLoss(model, stage)
    if not dist.is_initialized():
        return loss
    return DistributedDataParallel(loss, forward_sync_buffers=False, gradient_as_bucket_view=True)


# ---------------------------------------------------------------------------------------------
# 7. Memory


class AdamWInBf16(torch.optim.AdamW):
    """torch's fused AdamW, its two moments rounded to bf16 after each step: of the 16 bytes that
    training holds for a parameter (weight, gradient, moments) 4 go.

    The step itself computes in fp32, as DeepSeek-V3's does (arXiv 2412.19437, section 3.3.3). bf16
    has 8 significant bits, so a moment that is to change by less than 1/512 of itself stays as it
    is. A step takes the second one 1 - beta2 of the way to the new square, 1/20 by default, which
    is far above that; beta2 over 0.99 is refused (`Config.faults`).
    """

    SLICE = 2**18  # elements in fp32 at one time, on a CPU: they stay in its cache

    @torch.no_grad()
    def step(self):
        """m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, and with m', v' = m / (1 - b1^t),
        v / (1 - b2^t) the weight moves by -lr (m' / (sqrt(v') + eps) + decay w)."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weights, gradients, first, second, steps in self.parts(group):
                m = [torch.empty_like(part, dtype=torch.float32) for part in first]
                v = [torch.empty_like(part, dtype=torch.float32) for part in second]
                torch._foreach_copy_(m, first)
                torch._foreach_copy_(v, second)
                torch._fused_adamw_(
                    weights, gradients, m, v, [], steps, lr=group["lr"], beta1=beta1, beta2=beta2,
                    weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                    maximize=False, found_inf=getattr(self, "found_inf", None),
                )  # fmt: skip
                torch._foreach_copy_(first, m)
                torch._foreach_copy_(second, v)

    def parts(self, group):
        """Yield a group's weights, gradients, moments and numbers of steps, as five lists: on a CPU
        of one slice, on a GPU, where launches cost, of all parameters."""
        rows, counts = [], []
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros_like(p, dtype=torch.bfloat16)
            tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
            size = p.numel() if p.is_cuda else self.SLICE
            slices = zip(*(tensor.flatten().split(size) for tensor in tensors))
            rows += [(*slice_, state["step"]) for slice_ in slices]
            counts.append(state["step"])
        if not rows:
            return
        torch._foreach_add_(counts, 1)  # also where fp16 overflows and the step is skipped
        if group["params"][0].is_cuda:
            yield [*map(list, zip(*rows))]
        else:
            yield from ([[part] for part in row] for row in rows)


def memory(model, optimizer=None):
    """What training holds, in MiB, counted from the tensors: weights_mib, gradients_mib,
    optimizer_mib."""
    weights = [*model.parameters(), *model.buffers()]
    states = optimizer.state.values() if optimizer else ()
    held = {"weights_mib": weights, "gradients_mib": [t for t in weights if t.requires_grad],
            "optimizer_mib": [t for state in states for t in state.values()]}  # fmt: skip
    return {kind: sum(t.nbytes for t in tensors) / MIB for kind, tensors in held.items()}


def memory_mib(device, reset=False):
    """Memory in use now and its peak since the last reset, in MiB; (None, None) where unknown.

    CUDA: what tensors occupy. Linux: the process's resident memory, whose peak the kernel
    resets on request.
    """
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return now / MIB, peak / MIB
    try:
        if reset:
            with contextlib.suppress(OSError):  # where it may not, the peak is the process's own
                Path("/proc/self/clear_refs").write_text("5")
        text = Path("/proc/self/status").read_text()
        lines = dict(line.split(":", 1) for line in text.splitlines())
        return tuple(int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    except (KeyError, OSError):  # macOS, Windows, sandboxes
        return None, None


def watch_peak(state, device):
    """Keep the largest peak of the stage, over all its resumed parts."""
    state.peak_mib = max(state.peak_mib, memory_mib(device)[1] or 0.0)


def keep_freed_memory(return_now=False):
    """Let glibc keep what a step frees, for the next step to use again.

    By default it gives every large tensor back to the kernel and gets it anew, page by page and
    zeroed; so Hugging Face's step of GPT-2 Small takes 1.5 times as long (data/results).
    return_now: give back all that is free now. Does nothing where there is no glibc.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc: macOS, Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never cut back ...
        if return_now:
            libc.malloc_trim(0)  # ... but here


# ---------------------------------------------------------------------------------------------
# 8. A run's beginning and end

# Keys that --resume may change: they alter what is reported or how it is computed, not the run
# (but for rounding, and the masks of dropout, where the device changes).
MAY_CHANGE = {"log_interval", "eval_interval", "eval_rows", "checkpoint_interval",
              "checkpoint_seconds", "device", "gradient_checkpointing", "compile",
              "token_folder"}  # fmt: skip


def resumed_config(stored, args):
    """A run's own Config with the command line's changes. UserError if they make it another run."""
    config = load_config(args.config, args.preset, args.overrides, stored=vars(stored))
    for key, value in vars(config).items():
        if value != getattr(stored, key) and key not in MAY_CHANGE:
            raise UserError(f"{key} was {getattr(stored, key)!r} when the run began; to train with "
                            f"{value!r}, choose training.run_id=NAME instead of --resume")
    return config


def begin_run(run, state):
    """Make a run's folder with a first checkpoint, an earlier one moved aside. -> its lock"""
    if run.checkpoint.exists() or run.backup(0).exists():
        run.lock().close()  # UserError: it is being trained
        number = 1
        while (aside := run.folder.with_name(f"{run.name}.old-{number}")).exists():
            number += 1
        run.folder.rename(aside)
        say(f"the earlier run is now {aside}")
    lock = run.lock()
    run.cut_metrics(0)
    save_run(run, state)
    return lock


@contextlib.contextmanager
def noted_signals():
    """Yield a list to which Ctrl-C, SIGTERM and SIGHUP (a closed terminal) are added: a training
    stops after the step under way, and saves. A second Ctrl-C stops at once."""
    signals = []

    def note(number, _):
        if number == signal.SIGINT and number in signals:
            raise KeyboardInterrupt
        signals.append(number)
        if rank() == 0:
            with contextlib.suppress(OSError):  # not by print, which a signal may have interrupted
                os.write(1, b"stopping after this step; Ctrl-C again stops at once\n")

    every = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
             if hasattr(signal, name)]  # fmt: skip
    earlier = {number: signal.signal(number, note) for number in every
               if signal.getsignal(number) != signal.SIG_IGN}  # nohup: stays ignored
    try:
        yield signals
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@one_line_errors
def main(argv):
    parser = Parser(description="Train GPT-2 block by block by mask diffusion.")
    parser.add_argument("--config", default=DEFAULTS, help="default: gpt2.yaml")
    parser.add_argument("--preset", metavar="NAME", help="a preset of the config, e.g. tiny")
    parser.add_argument("--resume", metavar="RUN", help="go on where a run was stopped; needs no "
                        "other argument")
    parser.add_argument("--overwrite", action="store_true", help="move an earlier run aside")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="a key of "
                        "gpt2.yaml, e.g. training.lr=2e-3")
    args = parser.parse_intermixed_args(argv)
    if args.resume is not None:
        run = Run.named(args.resume)
        lock = run.lock() if os.environ.get("RANK", "0") == "0" else None  # held to the end
        state, tensors = read_checkpoint(run)
        config = state.config = resumed_config(state.config, args)
        if state.finished:
            say(f"run {run.name} is finished; evaluate it: python evaluate_gpt2.py --run {run}")
            return 0
    else:
        config = load_config(args.config, args.preset, args.overrides)
        run, state, tensors = Run(Path(config.folder) / config.run_id), None, {}
        if run.checkpoint.exists() and not args.overwrite:
            raise UserError(f"run {run.name} exists; go on with --resume {run}, move it aside with "
                            "--overwrite, or choose training.run_id=NAME")
    device = usable(start_processes(pick_device(config.device)))
    rows = config.batch_size * config.gradient_accumulation
    if rows % world_size():
        raise UserError(f"{world_size()} processes cannot share batch_size x gradient_accumulation "
                        f"= {rows} rows equally")
    # What can fail (steps, text, weights, devices) fails before an earlier run is touched.
    first_stage = fusion_schedule(config)[0]
    tokens, val_tokens, digest = load_tokens(config, state and state.tokens_sha256, rows)
    val_rows = validation_rows(val_tokens, config.seq_len, config.eval_rows)
    batch_of(tokens, config, first_stage, 0)  # UserError: the text is too short
    pretrained = None
    if config.init_from != "scratch" and (state is None or state.blocks < config.total_blocks):
        pretrained = read_pretrained(config.init_from, config)
    if state is None:
        state = State(config, digest)
        lock = begin_run(run, state) if rank() == 0 else None
    elif rank() == 0:
        run.cut_metrics(state.metrics_bytes)
    model, state, optimizer_tensors = load_run(run, device, checkpoint=(state, tensors))
    if state.stage or state.step:
        say(f"resuming {run.name} in stage {state.stage} after step {state.step}")
    else:
        print_plan(run, config, device, len(tokens))
    with noted_signals() as signals:
        train(run, state, model, optimizer_tensors, tokens, val_rows, pretrained, signals)
    if not state.finished:
        python = "python" if world_size() == 1 else f"torchrun --nproc-per-node={world_size()}"
        say(f"stopped and saved in {run.folder}; go on: "
            f"{python} train_gpt2_fusion.py --resume {run}")
    else:
        print_stages(run)
        say(f"\nevaluate it:  python evaluate_gpt2.py --run {run}\n"
            f'write text:   python evaluate_gpt2.py sample "The people of" --run {run} --watch')
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if state.finished else 130


if __name__ == "__main__":
    sys.exit(main())
