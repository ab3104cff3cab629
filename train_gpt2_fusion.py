"""Train GPT-2 as a mask-diffusion model, one block of layers after another.

    python train_gpt2_fusion.py --preset tiny               learns in minutes on two CPU cores
    python train_gpt2_fusion.py                             GPT-2 Small, gpt2.yaml as it stands
    python train_gpt2_fusion.py --resume                    go on where the run was stopped
    python train_gpt2_fusion.py training.mode=standard      end to end: the control
    torchrun --nproc-per-node=2 train_gpt2_fusion.py        the same run on two processes

Read from top to bottom: `TrainingConfig`, `Stage` and `fusion_schedule` (which layers are trained
when, on which noise), `begin_stage` and `end_stage` (freeze, back up, convert), `train_stage` (the
loop), `run_stages` (the stages, one after another), `main`.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lora
import quant
from data_loader import (DataConfig, UserError, load_config, load_tokens, n_rows, one_line_errors,
                         training_rows, validation_rows, write_atomically)
from evaluate_gpt2 import (keep_freed_memory, load_run, memory, memory_mib, pick_device,
                           read_config, read_metrics, report, row_noise, score)
from model import (GPT, ModelConfig, autocast, compute_type, corrupt, diffusion_loss,
                   read_pretrained, stratified, time_steps_of)

# ---------------------------------------------------------------------------------------------
# 1. Configuration


COMPUTE_TYPES = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainingConfig:
    """`training:` in gpt2.yaml, where each key is explained. ValueError names a bad key."""

    mode: str = "fused"
    fusion_mode: str = "frozen"
    total_blocks: int = 3
    block_size: int = 4
    block_steps: tuple[float, ...] = (8, 1, 1)
    block_mask_ranges: tuple[tuple[float, float], ...] = ((0.0, 0.4), (0.4, 0.7), (0.7, 1.0))
    time_step_masking: bool = True
    time_step_mask_fractions: tuple[float, ...] = ModelConfig.time_step_mask_fractions
    qlora_enabled: bool = True
    qlora_rank: int = 8
    qlora_alpha: float = 16.0
    qlora_dropout: float = 0.0
    qlora_lr: float = 1e-3
    quantization_type: str = "fp16"
    lr: float = 5e-4
    lr_min_share: float = 0.1
    warmup_steps: int = 40
    weight_decay: float = 0.1
    beta2: float = 0.95
    grad_clip: float = 1.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_steps: int = 2000
    log_interval: int = 10
    eval_interval: int = 100
    eval_rows: int = 16
    checkpoint_interval: int = 100
    seed: int = 0
    run_id: str = "gpt2-small"
    folder: str = "checkpoints"
    gradient_checkpointing: bool = False
    compute_type: str = "auto"
    device: str = "auto"

    def __post_init__(self):
        def check(keys, holds, rule):
            for key in keys.split():
                if not holds(getattr(self, key)):
                    raise ValueError(f"{key} must be {rule}, not {getattr(self, key)!r}")

        check("mode", ("fused", "standard").__contains__, "fused or standard")
        check("fusion_mode", ("frozen", "trainable").__contains__, "frozen or trainable")
        check("quantization_type", quant.KINDS.__contains__, " or ".join(quant.KINDS))
        check("compute_type", COMPUTE_TYPES.__contains__, " or ".join(COMPUTE_TYPES))
        check("batch_size gradient_accumulation max_steps qlora_rank log_interval eval_interval "
              "eval_rows checkpoint_interval", lambda value: value >= 1, "at least 1")
        check("lr qlora_lr qlora_alpha grad_clip", lambda value: value > 0, "above 0")
        check("weight_decay warmup_steps seed", lambda value: value >= 0, "at least 0")
        check("beta2 lr_min_share qlora_dropout", lambda value: 0 <= value < 1, "in [0, 1)")
        check("block_steps", lambda value: min(value, default=0) > 0, "above 0")
        check("run_id", lambda value: value and "/" not in value and value[0] != ".",
              "a plain folder name")
        if self.mode == "fused" and len(self.block_steps) != self.total_blocks:
            raise ValueError(f"block_steps needs one share per block: {self.total_blocks} blocks, "
                             f"{len(self.block_steps)} shares")


# Keys that --resume may change: they alter what is reported or how it is computed, not the run
# (but for rounding, and the masks of dropout, where the device changes).
MAY_CHANGE = {"log_interval", "eval_interval", "eval_rows", "checkpoint_interval", "device",
              "gradient_checkpointing", "folder", "run_id"}


def standard_config(model_config):
    """mode: standard is one block that owns all layers and the whole band (0, 1]."""
    return dataclasses.replace(model_config, total_blocks=1, block_size=model_config.n_layers,
                               block_mask_ranges=((0.0, 1.0),))


# ---------------------------------------------------------------------------------------------
# 2. The schedule: which layers are trained when, on which noise


@dataclass(frozen=True)
class Stage:
    """The training of one block."""

    index: int
    block: int  # the exit that is read; the forward pass stops after this block
    steps: int
    time_steps: tuple[float, ...]  # mask fractions; (0.0,) is next-token training
    layers: tuple[int, ...]  # trained in fp32
    embeddings: bool  # trained too?
    adapters: bool  # LoRA on every linear of the frozen layers?
    plain: bool = False  # plain QLoRA: all layers are frozen and stored before the first step


def fusion_schedule(model_config, training):
    """The list of stages. A pure function; the training loop only walks it.

    frozen: stage k trains the layers of block k on block k's band, the blocks before it are frozen
    (and adapted, if qlora_enabled). trainable: stage k trains every layer up to block k and the
    embeddings. Standard mode has one block, hence one stage; from pretrained weights and with
    qlora_enabled that stage is plain QLoRA: adapters, exit norm and [MASK] row over frozen layers.
    """
    blocks, size = model_config.total_blocks, model_config.block_size
    frozen = training.fusion_mode == "frozen"
    plain = (training.mode == "standard" and training.qlora_enabled
             and model_config.init_from != "scratch")
    shares = training.block_steps if blocks > 1 else (1,)
    # Rounding the running sum, not each share, makes the steps add up to max_steps exactly.
    edges = [round(training.max_steps * sum(shares[:k]) / sum(shares)) for k in range(blocks + 1)]
    return [
        Stage(
            index=k,
            block=k,
            steps=edges[k + 1] - edges[k],
            time_steps=time_steps_of(k, model_config) if training.time_step_masking else (0.0,),
            layers=() if plain else tuple(range(k * size if frozen else 0, (k + 1) * size)),
            embeddings=(k == 0 or not frozen) and not plain,
            adapters=plain or training.qlora_enabled and frozen and k > 0,
            plain=plain,
        )
        for k in range(blocks)
    ]


def learning_rate_share(step, stage, training):
    """Linear warm-up, then cosine decay to lr_min_share, within the stage. -> (0, 1]"""
    warmup = min(training.warmup_steps, stage.steps // 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, stage.steps - warmup)
    low = training.lr_min_share
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def matmul_flops(stage, config):
    """Matrix-product FLOPs that one token of a stage needs, forward and backward.

    2 per weight forward, 2 for the gradient of the input, 2 for the gradient of the weight. Frozen
    layers need no weight gradient, so 4, and without adapters no backward pass, so 2. The two
    products of the attention have no weight among their factors: 2 forward, and 4 wherever there is
    a backward pass. They count whole, causal or not; the adapters (about 1 %) do not count.
    """
    d, trained = config.d_model, len(stage.layers)
    weights, attention = 12 * d * d, 2 * d * config.seq_len
    frozen = (stage.block + 1) * config.block_size - trained
    per_token = 6 * trained * (weights + attention)
    per_token += frozen * (4 * weights + 6 * attention if stage.adapters else
                           2 * (weights + attention))
    scored = 1.0
    if config.attention_mode == "bidirectional":
        scored = sum(stage.time_steps) / len(stage.time_steps)
    return per_token + (6 if stage.embeddings else 4) * d * config.rows * scored


def parameter_counts(config):
    """Parameters of (the embeddings, one layer, one exit norm)."""
    d = config.d_model
    return (config.rows + config.seq_len) * d, 12 * d * d + 13 * d, 2 * d


def standard_bytes(config):
    """Bytes of weights, gradients and AdamW state when all layers train in fp32 at once."""
    embeddings, layer, norm = parameter_counts(config)
    return 16 * (embeddings + config.n_layers * layer + norm)


# ---------------------------------------------------------------------------------------------
# 3. Beginning and ending a stage


def begin_stage(model, stage, training, pretrained=None, folder=None):
    """Build what the stage needs (if it is not there yet) and mark what it trains.

    Args:
        pretrained: tensors of `model.read_pretrained` that new blocks start from, or None.
        folder: the run's, where plain QLoRA backs up the layers that it is about to freeze.

    Returns:
        the AdamW optimizer over the stage's trainable parameters.
    """
    while model.blocks <= stage.block:
        # A block's layers start as a function of (seed, block) alone, whatever ran before.
        torch.manual_seed(1000 * training.seed + 1 + model.blocks)
        model.grow()
        if pretrained:
            model.fill_from(pretrained, model.blocks - 1)
        if stage.plain:
            back_up_and_convert(model, [stage.block], 0, training, folder)
    if stage.adapters and not lora.adapter_state(model, stage.block):
        lora.add_adapters(model, stage.block, training.qlora_rank, training.qlora_alpha,
                          training.qlora_dropout, training.seed, stage.plain)
    model.requires_grad_(False)
    parts = [] if stage.plain else [model.exit_norms[stage.block]]
    parts += [model.h[i] for i in stage.layers]
    parts += [model.wte, model.wpe] if stage.embeddings else []
    others = [parameter for part in parts for parameter in part.parameters()]
    adapters = [*lora.adapter_parameters(model, stage.block).values()] if stage.adapters else []
    for parameter in others + adapters:
        parameter.requires_grad_(True)
    train_mode(model, stage)
    groups = [
        # Biases and LayerNorms are not decayed (GPT-2's habit, after Loshchilov and Hutter 2019).
        {"params": [p for p in others if p.dim() == 2], "lr": training.lr},
        {"params": [p for p in others if p.dim() < 2], "lr": training.lr, "weight_decay": 0.0},
    ]
    if adapters:
        groups.append({"params": adapters, "lr": training.qlora_lr, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    for group in groups:
        group["peak_lr"] = group["lr"]
    model.gradient_checkpointing = training.gradient_checkpointing
    return torch.optim.AdamW(groups, betas=(0.9, training.beta2),
                             weight_decay=training.weight_decay, fused=True)


def train_mode(model, stage):
    """Dropout on in what the stage trains; frozen layers run without."""
    model.eval()
    for i in stage.layers:
        model.h[i].train()
    model.dropout.train(stage.embeddings)
    for module in model.modules():
        if isinstance(module, lora.LoRALinear):
            module.dropout.train(stage.adapters)


def end_stage(model, stage, stages, training, folder):
    """Back up what the stage finished, verified on disk, then convert it in place.

    In frozen mode that is the stage's own block; in trainable mode every block, after the last
    stage. Plain QLoRA did it before its first step, and what it trained is kept in checkpoint.pt.
    Returns the number of blocks that are backed up.
    """
    last = stage.index == len(stages) - 1
    if stage.plain:
        return model.blocks
    if training.fusion_mode == "frozen" or training.mode == "standard":
        done = [stage.block]
    else:
        done = range(model.blocks) if last else []
    back_up_and_convert(model, done, stage.steps, training, folder)
    return max(done) + 1 if done else 0


def back_up_and_convert(model, blocks, steps, training, folder):
    """Back up blocks as they are after `steps` steps, then convert them in place."""
    config = {"model": asdict(model.config), "training": asdict(training)}
    for block in blocks if process()[0] == 0 else ():
        state = {name: p.detach().cpu() for name, p in model.block_parameters(block).items()}
        state |= {name: t.cpu() for name, t in lora.adapter_state(model, block).items()}
        try:
            quant.write_backup(folder / "backup", block, state, steps, config)
        except FileExistsError:
            # Left by a process that was killed before its checkpoint counted it, and the way from
            # that checkpoint to here is not repeatable (another number of threads, a GPU).
            path = folder / "backup" / f"block_{block}.pt"
            path.rename(path.with_name(f"uncounted-{time.time_ns()}-{path.name}"))
            quant.write_backup(folder / "backup", block, state, steps, config)
    wait_for_all()  # no process converts before the backup is on disk
    for block in blocks:
        quant.freeze_block(model, block, training.quantization_type)


# ---------------------------------------------------------------------------------------------
# 4. What is measured while training


def clock(seconds):
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def matmul_rate(config, dtype, tokens=2048):
    """FLOP/s that this machine reaches in a product of the MLP's shape (median of 5)."""
    x = torch.randn(tokens, config.d_model, dtype=dtype)
    w = torch.randn(4 * config.d_model, config.d_model, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - start)
    return 2 * x.numel() * len(w) / sorted(times[1:])[2]


def step_efficiency(config):
    """The share of that rate that whole steps reached, as measured on 2 cores: narrow models spend
    more of their time outside the matrix products."""
    return 0.6 if config.d_model >= 512 else 0.45


# ---------------------------------------------------------------------------------------------
# 5. More than one process: torchrun starts them, each takes a slice of every batch


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


def process():
    """(number of this process, number of processes). Process 0 writes all files and prints."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all():
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def process_0_first():
    """What stands inside is done by process 0, and then by the others, who find its files."""
    if process()[0]:
        wait_for_all()
    yield
    if not process()[0]:
        wait_for_all()


def gathered(values):
    """The values of all processes, in their order: (n,) each -> (processes * n,)."""
    if not dist.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


class StageLoss(nn.Module):
    """`diffusion_loss` of a stage as a module, which DistributedDataParallel asks for."""

    def __init__(self, model, stage):
        super().__init__()
        self.model, self.block = model, stage.block

    def forward(self, x_0, x_t, mask, mask_fraction, rows):
        return diffusion_loss(self.model, x_0, x_t, mask, mask_fraction, self.block, rows)


def stage_loss(model, stage):
    """The StageLoss; with several processes, one whose backward averages the trainable
    parameters' gradients over them (frozen ones have none)."""
    loss = StageLoss(model, stage)
    if not dist.is_initialized():
        return loss
    return DistributedDataParallel(loss, forward_sync_buffers=False, gradient_as_bucket_view=True)


# ---------------------------------------------------------------------------------------------
# 6. The loop


def batch_of(tokens, model_config, training, stage, step):
    """The global batch of one step: a pure function of (seed, stage, step).

    Returns:
        x_0, x_t, mask, each (B, T), and mask_fraction (B,).
    """
    rows = training.batch_size * training.gradient_accumulation
    x_0 = training_rows(tokens, model_config.seq_len, rows, training.seed, stage.index, step)
    rng = np.random.default_rng([training.seed, stage.index, step, 1])
    mask_fraction = stratified(stage.time_steps, rows, int(rng.integers(len(stage.time_steps))))
    uniform = torch.from_numpy(rng.random(x_0.shape, dtype=np.float32))  # (B, T)
    x_t, mask = corrupt(x_0, mask_fraction, uniform, model_config.mask_id)
    return x_0, x_t, mask, mask_fraction


def validate(model, rows, stage, training):
    """Mean CE over the stage's time steps and the accuracy, on fixed validation rows."""
    model.eval()
    noise = row_noise(len(rows), rows.size(1), training.seed, tag=0)
    scores = [score(model, rows, torch.full((len(rows),), m), stage.block, noise,
                    batch_size=training.batch_size) for m in stage.time_steps]
    train_mode(model, stage)
    return tuple(torch.stack([s[i].mean() for s in scores]).mean().item() for i in (0, 1))


def train_step(loss_of, optimizer, scaler, batch, training, device, dtype):
    """Forward, backward, clip, update, on this process's slice of the batch.

    Args:
        loss_of: from `stage_loss`; batch: from `batch_of`, the same in every process.

    Returns:
        CE estimates of the slice's rows (B,) and the gradient norm before clipping, on the device.
    """
    number, processes = process()
    rows = len(batch[0]) // processes
    batch = [t[number * rows : (number + 1) * rows] for t in batch]
    if device.type == "cuda":
        batch = [t.pin_memory() for t in batch]
    batch = [t.to(device, non_blocking=True) for t in batch]
    by_row = []
    for i in range(0, rows, training.batch_size):
        last = i + training.batch_size >= rows
        # Gradients travel between processes once per step, with the last micro-batch.
        keep = contextlib.nullcontext() if processes == 1 or last else loss_of.no_sync()
        with keep:
            with autocast(device, dtype):
                loss, ce, _ = loss_of(*(t[i : i + training.batch_size] for t in batch), rows=rows)
            scaler.scale(loss).backward()
        by_row.append(ce)
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, training.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat(by_row), grad_norm


def train_stage(run, model, optimizer, stage, step):
    """The loop of one stage, from `step` on. Returns False if it was stopped before the last."""
    training, device = run.training, model.wte.weight.device
    dtype = compute_type(device, training.compute_type)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if run.scaler:
        scaler.load_state_dict(run.scaler)
    loss_of = stage_loss(model, stage)
    pending, seconds = [], 0.0  # steps and time since the last log line
    while step < stage.steps:
        started = time.perf_counter()
        lr_share = learning_rate_share(step, stage, training)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_share
        if model.config.dropout or training.qlora_dropout:
            # Any function of these numbers will do; the hash of integers is the same everywhere.
            torch.manual_seed(hash((training.seed, stage.index, step, process()[0])))
        batch = batch_of(run.tokens, model.config, training, stage, step)
        ce, grad_norm = train_step(loss_of, optimizer, scaler, batch, training, device, dtype)
        pending.append((batch, ce, grad_norm))
        step += 1

        last = step == stage.steps
        log = last or step % training.log_interval == 0
        stop = run.stop
        if dist.is_initialized():  # all processes must stop at the same step
            stop = bool(gathered(torch.tensor([int(stop)])).any())
        save = stop or (step % training.checkpoint_interval == 0 and not last)
        log = log or save
        if log:
            pending = [(batch, gathered(ce), norm) for batch, ce, norm in pending]
            check_finite(pending, stage, step, scaler, optimizer if save or last else None)
            record = summary(pending, grad_norm, optimizer, device)
        seconds += time.perf_counter() - started
        if log:
            run.log_step(stage, step, record, seconds)
            pending, seconds = [], 0.0
        if last or step % training.eval_interval == 0:
            with autocast(device, dtype):
                run.log_validation(stage, step, *validate(model, run.val_rows, stage, training))
        if save:
            run.scaler = scaler.state_dict()
            run.save(model, optimizer, stage, step)
        if stop:
            wait_for_all()  # for the checkpoint of process 0
            return last
    return True


def check_finite(pending, stage, step, scaler, optimizer):
    """UserError names the first step since the last log line with a loss or gradient not finite.

    Where `optimizer` is given, because its state or the weights are about to be saved, they are
    looked at too: the last update has not met a loss yet.
    """
    advice = "the last checkpoint is as it was; lower training.lr and start a new run"
    for number, (batch, ce, grad_norm) in enumerate(pending, step + 1 - len(pending)):
        # A loss scaler (fp16) expects gradients to overflow now and then, and skips those steps.
        if ce.isfinite().all() and (scaler.is_enabled() or grad_norm.isfinite()):
            continue
        rows = (~ce.isfinite()).nonzero().flatten().tolist() or list(range(len(ce)))
        m = ", ".join(f"{m:g}" for m in sorted(set(batch[3][rows].tolist())))
        raise UserError(f"the loss is {ce.mean().item()}, the gradient norm {grad_norm.item()}, in "
                        f"stage {stage.index + 1} (block {stage.block}) at step {number}, time "
                        f"step {m}, row {', '.join(map(str, rows[:8]))} of its batch; {advice}")
    kept = optimizer.state.items() if optimizer else ()
    if not all(t.isfinite().all() for p, state in kept for t in (p, *state.values())):
        raise UserError(f"weights or optimizer state of stage {stage.index + 1} (block "
                        f"{stage.block}) are not finite after step {step}; {advice}")


def summary(pending, grad_norm, optimizer, device):
    """The figures of a log line, from the (batch, CE by row, ...) of the steps since the last."""
    by_time_step = defaultdict(list)
    for (_, _, _, mask_fraction), ce, _ in pending:
        for m, value in zip(mask_fraction.tolist(), ce.tolist()):
            by_time_step[m].append(value)
    masked = [batch[2][:, 1:].float().mean().item() for batch, *_ in pending]
    return {
        "loss": float(np.mean([value for values in by_time_step.values() for value in values])),
        "loss_by_time_step": {f"{m:g}": np.mean(by_time_step[m]) for m in sorted(by_time_step)},
        "lr": optimizer.param_groups[0]["lr"],
        "grad_norm": grad_norm.item(),
        "masked_fraction": float(np.mean(masked)),
        "tokens": sum(batch[0].numel() for batch, *_ in pending),
        "memory_mib": memory_mib(device)[0],
    }


# ---------------------------------------------------------------------------------------------
# 7. A run: what goes to disk, and the stages one after another


class Run:
    """One training run: its folder, its data, its log and its checkpoints."""

    def __init__(self, model_config, training, tokens, val_rows, stages, pretrained):
        self.model_config, self.training, self.pretrained = model_config, training, pretrained
        self.tokens, self.val_rows, self.stages = tokens, val_rows, stages
        self.folder = None
        self.stop = False  # set by Ctrl-C and SIGTERM
        self.seconds = 0.0  # training time of the stage so far, validation and saving left out
        self.peak_mib = 0.0
        self.backed_up = 0
        self.scaler = {}
        self.losses = defaultdict(list)  # the logged ones of each stage
        self.metrics = None

    def record(self, event, **values):
        """Append a line to metrics.jsonl, opened unbuffered. OSError names it (a full disk)."""
        line = (json.dumps({"event": event, **values}) + "\n").encode()
        try:
            while line:  # what a full disk leaves of it makes the next write fail
                line = line[self.metrics.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.metrics.name) from error

    def log_step(self, stage, step, record, seconds):
        """Print and record a log line, and a note on a loss far above those before it."""
        tokens = record.pop("tokens")
        speed = tokens / seconds
        self.seconds += seconds
        self.record("step", stage=stage.index, block=stage.block, step=step, **record,
                    tokens_per_second=speed)
        left = sum((s.steps - (step if s is stage else 0)) * matmul_flops(s, self.model_config)
                   for s in self.stages[stage.index:])
        eta = left * tokens_per_step(self) / (speed * matmul_flops(stage, self.model_config))
        say(f"stage {stage.index + 1}  step {step:5d}/{stage.steps}  loss {record['loss']:.4f}  "
            f"lr {record['lr']:.1e}  grad {record['grad_norm']:5.2f}  {speed:7,.0f} tokens/s  "
            f"{record['memory_mib']:6,.0f} MiB  eta {clock(eta)}")
        before = self.losses[stage.index][-10:]
        usual = float(np.median(before or [math.inf]))
        if len(before) > 4 and record["loss"] > usual + max(0.5, max(before) - min(before)):
            say(f"note: a loss of {record['loss']:.4f}, where {usual:.4f} is usual (the median of "
                f"the last {len(before)} log lines); if it stays there, lower training.lr")
            self.record("loss_jump", stage=stage.index, step=step, loss=record["loss"], usual=usual)
        self.losses[stage.index].append(record["loss"])

    def log_validation(self, stage, step, cross_entropy, accuracy):
        """Print and record the validation figures of the exit in training."""
        perplexity = math.exp(min(cross_entropy, 700))
        self.record("validation", stage=stage.index, block=stage.block, step=step,
                    cross_entropy=cross_entropy, perplexity=perplexity, accuracy=accuracy)
        say(f"stage {stage.index + 1}  step {step:5d}/{stage.steps}  validation "
            f"{cross_entropy:.4f} nats, perplexity {perplexity:.1f}, accuracy {accuracy:.1%}")

    def save(self, model, optimizer, stage, step):
        """Write checkpoint.pt: all that --resume needs beside the backups.

        `stage` None means that the run is finished.
        """
        if process()[0]:
            return
        mid_stage = step > 0  # at a stage's start nothing of it has been trained yet
        if mid_stage:
            self.peak_mib = max(self.peak_mib, memory_mib(model.wte.weight.device)[1])
        plain = self.stages[0].plain  # what it trains is in no backup
        exit = stage.block if stage else 0
        weights = lora.adapter_state(model, exit) if mid_stage or plain else {}
        for block in range(self.backed_up, model.blocks):  # the others are in their backups
            weights |= model.block_parameters(block)
        os.fsync(self.metrics.fileno())  # metrics_bytes must be on disk before the checkpoint is
        if stage is None:  # an evaluation made meanwhile is of the unfinished model
            (self.folder / "eval.json").unlink(missing_ok=True)
        state = {
            "finished": stage is None,
            "stage": stage.index if stage else len(self.stages),
            "block": stage.block if stage else model.blocks - 1,
            "step": step,
            "backed_up": self.backed_up,
            "blocks": model.blocks,
            "weights": {name: tensor.detach().cpu() for name, tensor in weights.items()},
            "optimizer": optimizer.state_dict() if mid_stage else {},
            "scaler": self.scaler,
            "seconds": self.seconds,
            "peak_mib": self.peak_mib,
            "metrics_bytes": self.metrics.tell(),
        }
        quant.save_file(self.folder / "checkpoint.pt", state)

    def restore(self, state):
        """Take up where `state` was saved: counters, and metrics.jsonl cut back to that moment."""
        self.backed_up, self.scaler = state["backed_up"], state["scaler"]
        self.seconds, self.peak_mib = state["seconds"], state["peak_mib"]
        if process()[0] == 0:
            os.truncate(self.folder / "metrics.jsonl", state["metrics_bytes"])
        for line in read_metrics(self.folder, "step"):
            self.losses[line["stage"]].append(line["loss"])


def say(text=""):
    """Print at once, also into a pipe or a log file; process 0 alone speaks."""
    if process()[0] == 0:
        print(text, flush=True)


def run_stages(run, model, state, device):
    """Train all stages, or what `state` leaves of them. Returns False if asked to stop."""
    training, stages = run.training, run.stages
    first, step = (state["stage"], state["step"]) if state else (0, 0)
    for stage in stages[first:]:
        keep_freed_memory(return_now=True)  # the stage before held more
        memory_mib(device, reset=True)
        optimizer = begin_stage(model, stage, training, run.pretrained, run.folder)
        if stage.plain:
            run.backed_up = 1  # begin_stage has done it
        if step:
            optimizer.load_state_dict(state.pop("optimizer"))
        if not train_stage(run, model, optimizer, stage, step):
            return False
        step = 0
        held = memory(model, optimizer)
        del optimizer  # its state is as large as two copies of what was trained
        run.backed_up = max(run.backed_up, end_stage(model, stage, stages, training, run.folder))
        if run.backed_up:
            say(f"backed up in {run.folder / 'backup'}, verified, and now stored in "
                f"{training.quantization_type}: {run.backed_up} of {len(stages)} blocks\n")
        run.peak_mib = max(run.peak_mib, memory_mib(device)[1])
        run.record("stage", stage=stage.index, block=stage.block, step=stage.steps,
                   seconds=run.seconds, tokens=stage.steps * tokens_per_step(run),
                   held=held, peak_mib=run.peak_mib,
                   standard_bytes=standard_bytes(run.model_config))
        run.seconds, run.peak_mib, run.scaler = 0.0, 0.0, {}
        following = stages[stage.index + 1] if stage.index + 1 < len(stages) else None
        run.save(model, None, following, 0)
    return True


def tokens_per_step(run):
    """Tokens of one optimizer step: rows times context length."""
    return run.training.batch_size * run.training.gradient_accumulation * run.model_config.seq_len


def open_folder(training, resume, overwrite):
    """The run's folder, locked for this process, with no earlier run in it unless it is resumed.

    The kernel drops the lock when the process ends, however it ends.

    Returns:
        the folder and the open lock file.
    """
    folder = Path(training.folder) / training.run_id
    if process()[0]:
        return folder, contextlib.nullcontext()
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"run {training.run_id} is being trained by another process") from None
    if (folder / "config.json").exists() and not resume:
        if not overwrite:
            path = folder / "checkpoint.pt"
            ended = path.exists() and quant.load_file(path)["finished"]
            how = (f"is finished; evaluate it (python evaluate_gpt2.py --run {training.run_id})"
                   if ended else "exists; continue it with --resume")
            raise UserError(f"run {training.run_id} {how}, train it anew with --overwrite (the old "
                            f"run is moved aside), or choose training.run_id=NAME")
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(aside)
        say(f"the earlier run is now {aside}")
        lock.close()
        return open_folder(training, resume, overwrite)
    return folder, lock


def check_same_config(folder, model_config, training, data, text_digest):
    """Refuse to resume a run under a configuration or on a text that would make it another run."""
    old_model, old_training, old_data = read_config(folder)
    differing = []
    pairs = [("model", asdict(old_model), asdict(model_config)),
             ("training", old_training, asdict(training)),
             ("data", asdict(old_data), asdict(data))]
    for section, old, new in pairs:
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) == new.get(key) or (section, key) == ("data", "folder"):
                continue
            text = f"{section}.{key} was {old.get(key)!r} and is now {new.get(key)!r}"
            if section == "training" and key in MAY_CHANGE:
                say(f"note: {text}")
            else:
                differing.append(text)
    if differing:
        raise UserError(f"{'; '.join(differing)}: --resume needs this as it was; to train it as "
                        f"it is now, choose training.run_id=NAME")
    if json.loads((folder / "config.json").read_text())["tokens_sha256"] != text_digest:
        raise UserError(f"the training text has changed since run {training.run_id} began; put the "
                        f"old one back, or choose training.run_id=NAME")


def print_plan(run, device):
    """Say what is about to be done, and on a CPU about how long it will take."""
    c, training = run.model_config, run.training
    dtype = compute_type(device, training.compute_type)
    per_step = tokens_per_step(run)
    passes = training.max_steps * per_step / c.seq_len / n_rows(run.tokens, c.seq_len)
    end_to_end = "plain QLoRA" if run.stages[0].plain else "end to end"
    kind = training.fusion_mode if training.mode == "fused" else end_to_end
    say(f"run {training.run_id}: GPT-2 with {c.n_layers} layers, {c.d_model} wide, {c.n_heads} "
        f"heads, context {c.seq_len}, {c.attention_mode}, vocabulary {c.vocab_size}")
    say(f"mode {training.mode} ({kind}), {training.max_steps} steps of {per_step} tokens, "
        f"{passes:.1f} passes over {len(run.tokens):,} training tokens")
    say(f"device {device}, matrix products in {str(dtype).removeprefix('torch.')}, finished "
        f"blocks stored in {training.quantization_type}")
    if training.qlora_enabled and not any(stage.adapters for stage in run.stages):
        say("qlora_enabled has no effect: no trained layer stands behind a frozen one")
    if run.stages[0].plain:
        say("plain QLoRA: the pretrained layers and embeddings are backed up, verified and stored "
            f"in {training.quantization_type} before the first step;\nonly the adapters on all "
            "layers, the exit norm and the [MASK] row are trained, at qlora_lr")
    say("\nstage  layers  mask fractions  steps  trainable     frozen  adapters  (parameters)")
    for s in run.stages:
        embeddings, layer, norm = parameter_counts(c)
        trainable = len(s.layers) * layer + norm + embeddings * s.embeddings
        trainable += c.d_model * s.plain
        everything = embeddings + (s.block + 1) * (c.block_size * layer + norm)
        # rank x (in + out) of c_attn, c_proj, c_fc and the MLP's c_proj: 4 + 2 + 5 + 5 widths
        adapted = (s.block + 1) * c.block_size - len(s.layers)
        adapters = adapted * training.qlora_rank * 16 * c.d_model * s.adapters
        layers = f"{s.layers[0]}-{s.layers[-1]}" if s.layers else "none"
        masks = f"{s.time_steps[0]:g} - {s.time_steps[-1]:g}" if any(s.time_steps) else "none"
        say(f"{s.index + 1:5d}  {layers:>6s}  "
            f"{masks:>14s}  {s.steps:5d}  "
            f"{trainable / 1e6:7.2f} M  {(everything - trainable) / 1e6:7.2f} M  "
            f"{adapters / 1e6:6.2f} M")
    if device.type == "cpu":
        flops = per_step * sum(s.steps * matmul_flops(s, c) for s in run.stages)
        seconds = flops / (matmul_rate(c, dtype) * step_efficiency(c))
        say(f"\nno GPU: about {clock(seconds)} of training (threads per process: "
            f"{torch.get_num_threads()}), then the evaluation")
    say()
    run.record("plan", stages=[asdict(stage) for stage in run.stages])


def open_run(run, resume, data, digest, device):
    """Write config.json, or check it and rebuild the run from its checkpoint.

    Returns:
        model, and the state to go on from (None at the beginning).
    """
    folder, training = run.folder, run.training
    if (folder / "config.json").exists():
        check_same_config(folder, run.model_config, training, data, digest)
        if (folder / "checkpoint.pt").exists():
            model, state = load_run(folder, device=device, resume=True)
            run.restore(state)
            return model, state
    else:
        if resume:
            say(f"there is no run {training.run_id} to resume; starting it")
        text = json.dumps({"model": asdict(run.model_config), "training": asdict(training),
                           "data": asdict(data), "tokens_sha256": digest}, indent=1)
        write_atomically(folder / "config.json", text.encode())
    torch.manual_seed(1000 * training.seed)  # the embeddings'; the blocks' follow in begin_stage
    return GPT(run.model_config, blocks=0).to(device), None


@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="Train GPT-2 block by block by mask diffusion.")
    parser.add_argument("--config", default="gpt2.yaml", help="default: gpt2.yaml")
    parser.add_argument("--preset", metavar="NAME", help="a preset of the config, e.g. tiny")
    parser.add_argument("--resume", action="store_true", help="go on where the run was stopped")
    parser.add_argument("--overwrite", action="store_true", help="move an earlier run aside")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    sections = {"model": ModelConfig, "training": TrainingConfig, "data": DataConfig}
    config = load_config(args.config, sections, args.preset, args.overrides)
    model_config, training, data = (config[name] for name in sections)
    if training.mode == "standard":
        model_config = standard_config(model_config)
    if not training.time_step_masking and model_config.attention_mode != "causal":
        raise UserError("training.time_step_masking=false (next-token training) needs "
                        "model.attention_mode=causal")
    device = start_processes(pick_device(training.device))
    stages = fusion_schedule(model_config, training)
    if min(stage.steps for stage in stages) < 1:
        raise UserError(f"training.max_steps={training.max_steps} leaves a block without a step")
    rows = training.batch_size * training.gradient_accumulation
    if rows % process()[1]:
        raise UserError(f"training.batch_size x gradient_accumulation = {rows} rows cannot be "
                        f"shared equally by {process()[1]} processes")
    with process_0_first():
        tokens = load_tokens(data, "train", model_config.vocab_size)
        val_tokens = load_tokens(data, "val", model_config.vocab_size)
        pretrained = None
        if model_config.init_from != "scratch":
            try:
                _, pretrained = read_pretrained(model_config.init_from, model_config, data.folder)
            except ValueError as error:
                raise UserError(f"model.init_from: {error}") from None
    val_rows = validation_rows(val_tokens, model_config.seq_len, training.eval_rows)
    batch_of(tokens, model_config, training, stages[0], 0)  # UserError if the text is too short

    digest = hashlib.sha256(tokens).hexdigest()
    run = Run(model_config, training, tokens, val_rows, stages, pretrained)
    with process_0_first():
        run.folder, lock = open_folder(training, args.resume, args.overwrite)
        model, state = open_run(run, args.resume, data, digest, device)
    if state and state["finished"] and (run.folder / "eval.json").exists():
        say(f"run {training.run_id} is finished, nothing to resume; evaluate it (python "
            f"evaluate_gpt2.py --run {training.run_id}), or train it anew with --overwrite")
        return 0

    def stop(*_):
        run.stop = True

    metrics = os.devnull if process()[0] else run.folder / "metrics.jsonl"
    with lock, open(metrics, "ab" if state else "wb", 0) as run.metrics:
        if state and state["finished"]:
            say("training is finished; only its evaluation is missing")
        elif state:
            say(f"resuming in stage {state['stage'] + 1} after step {state['step']}")
        else:
            print_plan(run, device)
        if process()[0] == 0:  # of an evaluation before the run went on
            (run.folder / "eval.json").unlink(missing_ok=True)
        handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            finished = run_stages(run, model, state, device)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        number, _ = process()
        if dist.is_initialized():
            dist.destroy_process_group()  # process 0 evaluates alone
        if number:
            return 0 if finished else 130
        if not finished:
            say(f"stopped and saved in {run.folder}; go on with the same command and --resume")
            return 130
        result = report(run.folder, model, say=say)
        write_atomically(run.folder / "eval.json", json.dumps(result, indent=1).encode())
    say(f"\nall of it is in {run.folder}; python evaluate_gpt2.py --run {training.run_id} repeats "
        f"this")
    return 0


if __name__ == "__main__":
    sys.exit(main())
