"""Train GPT-2 as a mask-diffusion model, one block of layers after another.

    python train_gpt2_fusion.py --preset tiny               three minutes on two CPU cores
    python train_gpt2_fusion.py                             GPT-2 Small, gpt2.yaml as it stands
    python train_gpt2_fusion.py --resume tiny               go on where the run was stopped
    python train_gpt2_fusion.py training.mode=standard      end to end: the control
    torchrun --nproc-per-node=2 train_gpt2_fusion.py        the same run on two processes

Read from top to bottom:

1. `Stage`, `fusion_schedule`         which layers are trained when, on which noise
2. `begin_stage`, `store_blocks`      freeze and adapt; back up, then convert
3. `batch_of`, `train_step`, `Trainer.train_stage`   the hot path, and beside it what logs and saves
4. `Trainer.train`                    the stages, one after another
5. `start_processes`, `stage_loss`    more than one process
6. `main`                             the plan, the run's folder, the command line
"""

import contextlib
import math
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lora
import quant
from data_loader import (DEFAULTS, Parser, UserError, load_config, load_tokens, one_line_errors,
                         rows_in, training_rows, user_path, validation_rows)
from evaluate_gpt2 import (MIB, Run, State, cell, is_pretrained, keep_freed_memory, kind_of_run,
                           memory, memory_mib, perplexity, pick_device, print_table, report,
                           row_noise, score)
from model import (CHUNK, GPT, autocast, compute_type, corrupt, diffusion_loss, read_pretrained,
                   stratified, time_steps_of)

# ---------------------------------------------------------------------------------------------
# 1. The schedule: which layers are trained when, on which noise


@dataclass(frozen=True)
class Stage:
    """The training of one block. Stages count like blocks, from 0."""

    block: int  # the exit that is read; the forward pass stops after this block
    steps: int
    time_steps: tuple[float, ...]  # mask fractions; (0.0,) is next-token training
    layers: tuple[int, ...]  # trained in fp32
    embeddings: bool  # trained too?
    adapted: tuple[int, ...]  # frozen layers whose linears get LoRA adapters for this exit
    stored: tuple[int, ...]  # blocks that are backed up and converted when the stage ends
    plain: bool = False  # plain QLoRA: block 0 is backed up and converted before the first step


def fusion_schedule(config, training):
    """The list of stages, from a ModelConfig and a TrainingConfig; the training only walks it.

    frozen: stage k trains the layers of block k on block k's band, the blocks before it are frozen
    (and adapted, if qlora_enabled). trainable: stage k trains every layer up to block k and the
    embeddings. Standard mode has one block, hence one stage; from pretrained weights and with
    qlora_enabled that stage is plain QLoRA: adapters, exit norm and [MASK] row over frozen layers.
    """
    blocks, size = config.total_blocks, config.block_size
    frozen = training.fusion_mode == "frozen" or training.mode == "standard"
    plain = (training.mode == "standard" and training.qlora_enabled
             and config.init_from != "scratch")  # fmt: skip
    shares = training.block_steps if blocks > 1 else (1,)
    # Rounding the running sum, not each share, makes the steps add up to max_steps exactly.
    edges = [round(training.max_steps * sum(shares[:k]) / sum(shares)) for k in range(blocks + 1)]
    stages = []
    for k in range(blocks):
        up_to_k = tuple(range((k + 1) * size))
        before, own = up_to_k[: k * size], up_to_k[k * size :]
        layers, adapted = own if frozen else up_to_k, before if frozen else ()
        if frozen:
            stored = (k,)
        else:
            stored = tuple(range(blocks)) if k == blocks - 1 else ()
        if plain:
            layers, adapted, stored = (), own, ()
        stages.append(Stage(
            block=k,
            steps=edges[k + 1] - edges[k],
            time_steps=time_steps_of(k, config) if training.time_step_masking else (0.0,),
            layers=layers,
            embeddings=(k == 0 or not frozen) and not plain,
            adapted=adapted if training.qlora_enabled else (),
            stored=stored,
            plain=plain,
        ))  # fmt: skip
    return stages


def learning_rate_share(step, stage, training):
    """Linear warm-up, then cosine decay to lr_min_share, within the stage. -> (0, 1]"""
    warmup = min(training.warmup_steps, stage.steps // 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (stage.steps - warmup)
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
    per_token += frozen * (4 * weights + 6 * attention if stage.adapted else
                           2 * (weights + attention))
    scored = 1.0
    if config.attention_mode == "bidirectional":
        scored = sum(stage.time_steps) / len(stage.time_steps)
    return per_token + (6 if stage.embeddings else 4) * d * config.padded_vocab_size * scored


def parameter_counts(config):
    """Parameters of (the embeddings, one layer, one exit norm)."""
    d = config.d_model
    return (config.padded_vocab_size + config.seq_len) * d, 12 * d * d + 13 * d, 2 * d


LIBRARIES_MIB = 170  # on a CPU, measured: the matrix library's kernels and caches, gaps in the heap


def memory_needed(stage, config, training, dtype, processes=1):
    """MiB that a stage needs at its peak, beside what the process holds before it begins.

    By count: 16 bytes for each trained parameter (fp32 weight, gradient, AdamW's two), the frozen
    ones as they are stored. By formula, with s bytes in the compute type `dtype`: a layer keeps
    (8 + 16 s) d + s n_heads T bytes of each token for its backward pass, 4 d where it is to be
    recomputed, nothing where no gradient goes through; the head holds its weight in the compute
    type, a chunk of logits, and the hidden states with their gradient.
    """
    c, d, s, kind = config, config.d_model, dtype.itemsize, training.quantization_type
    embeddings, layer, norm = parameter_counts(c)
    n_trained, n_frozen = len(stage.layers), (stage.block + 1) * c.block_size - len(stage.layers)
    held = 16 * (n_trained * layer + norm + embeddings * stage.embeddings)
    held += 16 * len(stage.adapted) * training.qlora_rank * 16 * d  # see `print_plan`
    held += n_frozen * (12 * d * d * quant.KINDS[kind] + 4 * 13 * d)
    held += 0 if stage.embeddings else embeddings * (4 if kind == "fp32" else 2)

    rows = min(training.batch_size, training.batch_size * training.gradient_accumulation
               // processes)  # fmt: skip
    tokens = rows * c.seq_len
    whole, mode = (8 + 16 * s) * d + s * c.n_heads * c.seq_len, training.gradient_checkpointing
    kept = n_trained * (4 * d if mode == "all" else whole)
    kept += len(stage.adapted) * (whole if mode == "none" else 4 * d)
    head = s * c.padded_vocab_size * (d + min(CHUNK, tokens)) + (8 + s) * d * tokens
    return (held + tokens * kept + head) / MIB


# ---------------------------------------------------------------------------------------------
# 2. Beginning and ending a stage


def grow(model, training, pretrained=None):
    """Append the next block, with fresh weights or with those of `model.read_pretrained`."""
    # A block's layers start as a function of (seed, block) alone, whatever ran before.
    torch.manual_seed(1000 * training.seed + 1 + model.blocks)
    model.grow()
    if pretrained:
        model.fill_from(pretrained, model.blocks - 1)


def begin_stage(model, stage, training):
    """Add the stage's adapters, unless they are there, and mark what it trains.

    Returns:
        the AdamW optimizer over the stage's trainable parameters.
    """
    if stage.adapted and not lora.adapter_parameters(model, stage.block):
        lora.add_adapters(model, stage.block, stage.adapted, training.qlora_rank,
                          training.qlora_alpha, training.qlora_dropout, training.seed)
    if stage.plain and model.mask_row is None:
        model.add_mask_row()
    exit_norm = [*model.exit_norms[stage.block].parameters()]
    adapters = [*lora.adapter_parameters(model, stage.block).values()]
    if stage.plain:
        others, adapters = [], [model.mask_row, *adapters, *exit_norm]
    else:
        others = exit_norm + [p for i in stage.layers for p in model.h[i].parameters()]
        others += [model.wte.weight, model.wpe.weight] if stage.embeddings else []
    model.requires_grad_(False)
    for parameter in others + adapters:
        parameter.requires_grad_(True)
    train_mode(model, stage)
    groups = [
        # Biases and LayerNorms are not decayed (GPT-2's habit, after Loshchilov and Hutter 2019).
        {"params": [p for p in others if p.dim() == 2], "lr": training.lr},
        {"params": [p for p in others if p.dim() < 2], "lr": training.lr, "weight_decay": 0.0},
        {"params": adapters, "lr": training.qlora_lr, "weight_decay": 0.0},
    ]
    groups = [group | {"peak_lr": group["lr"]} for group in groups if group["params"]]
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
            module.dropout.train(bool(stage.adapted))


def store_blocks(run, model, blocks, state, step):
    """Back up blocks as they are after `step` steps, verified on disk; then convert them in place.

    From here on no stage changes what their exits compute: later stages train other parameters,
    and adapters act only while their own exit is read (`GPT.hidden`, `LoRALinear.forward`).
    """
    for block in blocks:
        seal = run.back_up(model, block, step) if process()[0] == 0 else ""
        state.backups.append(seal)
    wait_for_all()  # no process converts before the backup is on disk
    for block in blocks:
        quant.freeze_block(model, block, run.config.training.quantization_type)
    if blocks:
        model.requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# 3. The loop


def batch_of(tokens, config, training, stage, step):
    """The global batch of one step: a pure function of (seed, stage, step).

    Returns:
        x_0, x_t, mask, each (B, T), and mask_fraction (B,).
    """
    rows = training.batch_size * training.gradient_accumulation
    x_0 = training_rows(tokens, config.seq_len, rows, training.seed, stage.block, step)
    rng = np.random.default_rng([training.seed, stage.block, step, 1])
    mask_fraction = stratified(stage.time_steps, rows, int(rng.integers(len(stage.time_steps))))
    uniform = torch.from_numpy(rng.random(x_0.shape, dtype=np.float32))  # (B, T)
    x_t, mask = corrupt(x_0, mask_fraction, uniform, config.mask_id)
    return x_0, x_t, mask, mask_fraction


def train_step(loss_of, optimizer, scaler, batch, training, device, dtype):
    """Forward, backward, clip, update, on this process's slice of the batch.

    Args:
        loss_of: from `stage_loss`; batch: from `batch_of`, the same in every process.

    Returns:
        CE estimates of the slice's rows (B,) and the gradient norm before clipping, on the device.
    """
    batch = slice_of(batch, device)
    rows, by_row = len(batch[0]), []
    for i in range(0, rows, training.batch_size):  # gradient accumulation
        micro = [t[i : i + training.batch_size] for t in batch]
        with together(loss_of, last=i + training.batch_size >= rows):
            with autocast(device, dtype):
                loss, ce, _ = loss_of(*micro, rows=rows)
            scaler.scale(loss).backward()
        by_row.append(ce)
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(trained, training.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat(by_row), grad_norm


class Trainer:
    """Walks the stages of a run: trains, logs, saves."""

    def __init__(self, run, stages, tokens, val_rows, pretrained, device, state):
        self.run, self.stages, self.state, self.device = run, stages, state, device
        self.tokens, self.val_rows, self.pretrained = tokens, val_rows, pretrained
        self.config, self.training = run.config.model, run.config.training
        self.stopping = False  # set by a signal
        self.pending, self.pending_seconds = [], 0.0  # steps since the last log line
        self.losses = defaultdict(list)  # the logged ones of each stage
        for line in run.metrics("step"):
            self.losses[line["stage"]].append(line["loss"])

    def train_stage(self, model, optimizer, stage):
        """The loop of one stage. -> False if it was stopped before its last step"""
        training, state = self.training, self.state
        dtype = compute_type(self.device, training.compute_type)
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        if state.scaler:
            scaler.load_state_dict(state.scaler)
        loss_of = stage_loss(model, stage)
        while state.step < stage.steps:
            started = time.perf_counter()
            lr_share = learning_rate_share(state.step, stage, training)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_share
            self.seed_dropout(stage)
            batch = batch_of(self.tokens, self.config, training, stage, state.step)
            ce, grad_norm = train_step(loss_of, optimizer, scaler, batch, training, self.device,
                                       dtype)  # fmt: skip
            state.step += 1
            self.pending.append((batch, ce, grad_norm))
            if self.after_step(model, optimizer, scaler, stage, started):
                return False
        return True

    def seed_dropout(self, stage):
        """Make the masks of dropout a function of (seed, stage, step, process)."""
        if self.config.dropout or self.training.qlora_dropout:
            numbers = (self.training.seed, stage.block, self.state.step, process()[0])
            torch.manual_seed(hash(numbers))  # the hash of integers is the same everywhere

    def after_step(self, model, optimizer, scaler, stage, started):
        """Log, validate and save where it is time to. -> whether to stop here"""
        training, step, last = self.training, self.state.step, self.state.step == stage.steps
        stop = self.asked_to_stop() and not last  # the end of the stage saves, and stops itself
        save = stop or (step % training.checkpoint_interval == 0 and not last)
        validate = last or step % training.eval_interval == 0
        log = validate or save or step % training.log_interval == 0
        if log:
            self.pending = [(batch, gathered(ce), norm) for batch, ce, norm in self.pending]
            check_finite(self.pending, stage, step, scaler, optimizer if save or last else None)
            record = summary(self.pending, optimizer, self.device)
        self.pending_seconds += time.perf_counter() - started
        if log:
            line = self.log_step(stage, record)
            say(line + (self.log_validation(model, stage) if validate else ""))
            self.look_for_jump(stage, record["loss"])
        if save:
            self.state.scaler = scaler.state_dict()
            self.watch_peak()
            self.save(model, optimizer)
            wait_for_all()  # for the checkpoint of process 0
        return stop

    def log_step(self, stage, record):
        """Record the steps since the last log line. -> that line"""
        step, tokens = self.state.step, len(self.pending) * self.tokens_per_step()
        speed = tokens / self.pending_seconds
        self.state.seconds += self.pending_seconds
        self.pending, self.pending_seconds = [], 0.0
        self.record("step", stage=stage.block, step=step, **record, tokens_per_second=speed)
        left = sum((s.steps - (step if s is stage else 0)) * matmul_flops(s, self.config)
                   for s in self.stages[stage.block :])  # fmt: skip
        eta = left * self.tokens_per_step() / (speed * matmul_flops(stage, self.config))
        return (f"stage {stage.block}  step {step:5d}/{stage.steps}  loss {record['loss']:.4f}  "
                f"{speed:7,.0f} tokens/s  {cell(record['memory_mib'], '6,.0f')} MiB  "
                f"eta {clock(eta)}")

    def look_for_jump(self, stage, loss):
        """Print and record a note on a loss far above the logged ones before it."""
        before = self.losses[stage.block][-10:]
        usual = float(np.median(before or [math.inf]))
        if len(before) > 4 and loss > usual + max(0.5, max(before) - min(before)):
            say(f"note: a loss of {loss:.4f}, where {usual:.4f} is usual (the median of the last "
                f"{len(before)} log lines); if it stays there, lower training.lr")
            self.record("loss_jump", stage=stage.block, step=self.state.step, loss=loss,
                        usual=usual)  # fmt: skip
        self.losses[stage.block].append(loss)

    def log_validation(self, model, stage):
        """Record mean CE over the stage's time steps, on fixed validation rows. -> words on it"""
        step, rows, training = self.state.step, self.val_rows, self.training
        noise = row_noise(len(rows), rows.size(1), training.seed, tag=0)
        model.eval()
        with autocast(self.device, compute_type(self.device, training.compute_type)):
            scores = [score(model, rows, torch.full((len(rows),), m), stage.block, noise,
                            batch_size=training.batch_size) for m in stage.time_steps]  # fmt: skip
        train_mode(model, stage)
        ce, accuracy = (torch.stack([of_m.mean() for of_m in part]).mean().item()
                        for part in zip(*scores))  # fmt: skip
        self.record("validation", stage=stage.block, step=step, cross_entropy=ce,
                    perplexity=perplexity(ce), accuracy=accuracy)
        return f"  validation {ce:.4f}"

    def save(self, model, optimizer=None):
        """Write the checkpoint: all that --resume needs beside the backups."""
        if process()[0] == 0:
            self.run.save(model, optimizer, self.state)

    def watch_peak(self):
        self.state.peak_mib = max(self.state.peak_mib, memory_mib(self.device)[1] or 0.0)

    def record(self, event, **values):
        if process()[0] == 0:
            self.run.record(event, **values)

    def tokens_per_step(self):
        """Tokens of one optimizer step: rows times context length."""
        rows = self.training.batch_size * self.training.gradient_accumulation
        return rows * self.config.seq_len

    def stop(self, *_):
        """What a signal calls: stop after this step; at once when asked again."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        if process()[0] == 0:  # not by print, which a signal may have interrupted
            os.write(1, b"stopping after this step; once more stops at once\n")

    def asked_to_stop(self):
        """Whether a signal has reached this process or another: all stop at the same step."""
        return bool(gathered(torch.tensor([int(self.stopping)])).any())

    # -----------------------------------------------------------------------------------------
    # 4. The stages, one after another

    def train(self, model, optimizer_state):
        """Train all stages, or what the state leaves of them. -> False if asked to stop

        Args:
            optimizer_state: {name: tensor} from `Run.resume`, where it is in the middle of a stage.
        """
        run, training, state = self.run, self.training, self.state
        for stage in self.stages[state.stage :]:
            keep_freed_memory(return_now=True)  # the stage before held more
            while model.blocks <= stage.block:
                grow(model, training, self.pretrained)
            if stage.plain and not state.backups:
                store_blocks(run, model, [0], state, step=0)
            optimizer = begin_stage(model, stage, training)
            load_optimizer(optimizer, model, optimizer_state)
            memory_mib(self.device, reset=True)
            say(meaning(stage, training))
            if not self.train_stage(model, optimizer, stage):
                return False
            figures = self.stage_figures(model, optimizer, stage)
            del optimizer  # its state is as large as two copies of what was trained
            store_blocks(run, model, stage.stored, state, stage.steps)
            self.watch_peak()
            self.record("stage", **figures, peak_mib=state.peak_mib or None)
            if stage.stored:
                say(f"backed up, verified, and now stored in {training.quantization_type}: "
                    f"{len(state.backups)} of {self.config.total_blocks} blocks\n")
            self.state = state = State(stage=stage.block + 1, backups=state.backups,
                                       finished=stage is self.stages[-1])
            self.save(model)
            if state.finished:
                return not self.stopping  # process 0 alone goes on, and asks nobody
            if self.asked_to_stop():
                return False
        return True

    def stage_figures(self, model, optimizer, stage):
        """What metrics.jsonl and the last table say of a stage."""
        held = memory(model, optimizer)
        embeddings, layer, norm = parameter_counts(self.config)
        standard = 16 * (embeddings + self.config.n_layers * layer + norm) / MIB
        tokens = stage.steps * self.tokens_per_step()
        return {
            "stage": stage.block, "steps": stage.steps, "seconds": self.state.seconds,
            "tokens": tokens, "tokens_per_second": tokens / self.state.seconds,
            "weights_mib": held["total"] - held["gradients"] - held["optimizer"],
            "gradients_mib": held["gradients"], "optimizer_mib": held["optimizer"],
            "held_mib": held["total"],
            "standard_mib": standard,  # weights, gradients and AdamW state, all layers in fp32
        }  # fmt: skip


def load_optimizer(optimizer, model, tensors):
    """Move the state that `Run.resume` read, {parameter's name.key: tensor}, into an optimizer."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        p = parameters[owner]
        optimizer.state[p][key] = tensor.to(p.device, copy=True)
    tensors.clear()  # they are views of the checkpoint's file


def check_finite(pending, stage, step, scaler, optimizer):
    """UserError names the first step since the last log line with a loss or gradient not finite.

    Where `optimizer` is given, because its state or the weights are about to be saved, they are
    looked at too: the last update has not met a loss yet.
    """
    rate = "training.qlora_lr or training.lr" if stage.adapted else "training.lr"
    advice = f"the last checkpoint is as it was; lower {rate} and start a new run"
    for number, (batch, ce, grad_norm) in enumerate(pending, step + 1 - len(pending)):
        # A loss scaler (fp16) expects gradients to overflow now and then, and skips those steps.
        if ce.isfinite().all() and (scaler.is_enabled() or grad_norm.isfinite()):
            continue
        rows = (~ce.isfinite()).nonzero().flatten().tolist() or list(range(len(ce)))
        m = ", ".join(f"{m:g}" for m in sorted(set(batch[3][rows].tolist())))
        raise UserError(f"the loss is {ce.mean().item()}, the gradient norm {grad_norm.item()}, in "
                        f"stage {stage.block} at step {number}, time step {m}, row "
                        f"{', '.join(map(str, rows[:8]))} of its batch; {advice}")
    kept = optimizer.state.items() if optimizer else ()
    if not all(t.isfinite().all() for p, state in kept for t in (p, *state.values())):
        raise UserError(f"weights or optimizer state of stage {stage.block} are not finite after "
                        f"step {step}; {advice}")


def summary(pending, optimizer, device):
    """The figures of a log line, from (batch, CE by row, gradient norm) of the steps since the
    last."""
    by_time_step = defaultdict(list)
    for (_, _, _, mask_fraction), ce, _ in pending:
        for m, value in zip(mask_fraction.tolist(), ce.tolist()):
            by_time_step[m].append(value)
    masked = [batch[2][:, 1:].float().mean().item() for batch, *_ in pending]
    return {
        "loss": float(np.mean([value for values in by_time_step.values() for value in values])),
        "loss_by_time_step": {f"{m:g}": np.mean(by_time_step[m]) for m in sorted(by_time_step)},
        "lr": optimizer.param_groups[0]["lr"],
        "grad_norm": pending[-1][2].item(),
        "masked_fraction": float(np.mean(masked)),
        "memory_mib": memory_mib(device)[0],
    }


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


def slice_of(batch, device):
    """This process's rows of a batch, on its device."""
    number, processes = process()
    rows = len(batch[0]) // processes
    batch = [t[number * rows : (number + 1) * rows] for t in batch]
    if device.type == "cuda":
        batch = [t.pin_memory() for t in batch]
    return [t.to(device, non_blocking=True) for t in batch]


def together(loss_of, last):
    """Context of a micro-batch: gradients travel between processes with the last one of a step."""
    return contextlib.nullcontext() if process()[1] == 1 or last else loss_of.no_sync()


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
# 6. The plan, the run's folder, the command line


def say(text=""):
    """Print at once, also into a pipe or a log file; process 0 alone speaks."""
    if process()[0] == 0:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # nobody reads on; the training goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


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
        nn.functional.linear(x, w)
        times.append(time.perf_counter() - start)
    return 2 * x.numel() * len(w) / sorted(times[1:])[2]


def meaning(stage, training):
    """What a stage does, in words."""

    def named(word, numbers):  # block 0, layers 2-3
        first, last = numbers[0], numbers[-1]
        return f"{word} {first}" if first == last else f"{word}s {first}-{last}"

    learners = [named("layer", stage.layers)] if stage.layers else ["exit norm", "[MASK] row"]
    learners += ["embeddings"] if stage.embeddings else []
    task = "m " + " ".join(f"{m:g}" for m in stage.time_steps)
    if stage.time_steps == (0.0,):
        task = "the next token, without masks"
    text = f"stage {stage.block}: {' and '.join(learners)} learn {task}"
    if stage.plain:
        text += " on top of the pretrained layers"
    elif stage.layers[0]:
        text += f" on top of {named('block', range(stage.block))}"
    else:
        return text
    text += f", frozen in {training.quantization_type}"
    return text + (", adapted by LoRA" if stage.adapted else "")


def what_next(run, args):
    """(what for, command) of what one wants after a training; a control of equal length too."""
    lines = [("write text", f'python evaluate_gpt2.py sample "The people of" --run {run} --watch'),
             ("draw pictures (pip install matplotlib)", f"python evaluate_gpt2.py plot {run}")]
    fused = run.config.training.mode == "fused" and run.config.model.init_from == "scratch"
    if fused and not args.resume:
        words = ["--config", args.config] if args.config != DEFAULTS else []
        words += ["--preset", args.preset] if args.preset else []
        anew = ("training.run_id=", "training.max_steps=")
        words += [change for change in args.overrides if not change.startswith(anew)]
        control = load_config(args.config, args.preset, [*args.overrides, "training.mode=standard"])
        (end_to_end,) = fusion_schedule(control.model, control.training)
        work = sum(stage.steps * matmul_flops(stage, run.config.model)
                   for stage in fusion_schedule(run.config.model, run.config.training))
        steps = round(work / matmul_flops(end_to_end, control.model))
        words += ["training.mode=standard", f"training.run_id={run.name}-control",
                  f"training.max_steps={steps}"]  # fmt: skip
        lines += [("train the control, all layers at once for about as long",
                   f"python train_gpt2_fusion.py {shlex.join(words)}"),
                  ("compare", f"python evaluate_gpt2.py compare {run} {run}-control")]
    return lines


def print_plan(trainer):
    """Say what is about to be done, and on a CPU about how long it will take."""
    c, training, device = trainer.config, trainer.training, trainer.device
    dtype = compute_type(device, training.compute_type)
    per_step = trainer.tokens_per_step()
    passes = training.max_steps * per_step / c.seq_len / rows_in(len(trainer.tokens), c.seq_len)
    say(f"run {training.run_id}: GPT-2 with {c.n_layers} layers, {c.d_model} wide, {c.n_heads} "
        f"heads, context {c.seq_len}, {c.attention_mode}, vocabulary {c.vocab_size}")
    say(f"{kind_of_run(trainer.run.config)}, {training.max_steps} steps of {per_step} tokens, "
        f"{passes:.1f} passes over the {len(trainer.tokens):,} training tokens of "
        f"{trainer.run.config.data.source}")
    say(f"device {device}, matrix products in {str(dtype).removeprefix('torch.')}, finished "
        f"blocks stored in {training.quantization_type}")
    if training.qlora_enabled and not any(stage.adapted for stage in trainer.stages):
        say("qlora_enabled has no effect: no trained layer stands behind a frozen one")
    rows, now = [], memory_mib(device)[0] or 0
    now += LIBRARIES_MIB if device.type == "cpu" else 0
    for stage in trainer.stages:
        embeddings, layer, norm = parameter_counts(c)
        trained = len(stage.layers) * layer + norm + embeddings * stage.embeddings
        trained += c.d_model * stage.plain
        everything = embeddings + (stage.block + 1) * (c.block_size * layer + norm)
        # rank x (in + out) of c_attn, c_proj, c_fc and the MLP's c_proj: 4 + 2 + 5 + 5 widths
        adapters = len(stage.adapted) * training.qlora_rank * 16 * c.d_model
        rows.append({
            "stage": stage.block, "steps": stage.steps,
            "layers": f"{stage.layers[0]}-{stage.layers[-1]}" if stage.layers else "none",
            "mask fractions": " ".join(f"{m:g}" for m in stage.time_steps),
            "parameters trained": trained, "frozen": everything - trained, "adapters": adapters,
            "MiB at the peak": now + memory_needed(stage, c, training, dtype, process()[1]),
        })  # fmt: skip
    say()
    print_table({"stage": "d", "layers": "", "mask fractions": "", "steps": "d",
                 "parameters trained": ",", "frozen": ",", "adapters": ",",
                 "MiB at the peak": ",.0f"}, rows, say)
    if device.type == "cpu":
        flops = per_step * sum(s.steps * matmul_flops(s, c) for s in trainer.stages)
        # The share of that rate that whole steps reached on 2 cores: narrow models spend more of
        # their time outside the matrix products.
        efficiency = 0.6 if c.d_model >= 512 else 0.45
        say(f"\nno GPU: about {clock(flops / (matmul_rate(c, dtype) * efficiency))} of training "
            f"on an idle machine (threads per process: {torch.get_num_threads()}), then the "
            f"evaluation")
    say()
    trainer.record("plan", stages=[asdict(stage) for stage in trainer.stages])


# Keys that --resume may change: they alter what is reported or how it is computed, not the run
# (but for rounding, and the masks of dropout, where the device changes).
MAY_CHANGE = {"log_interval", "eval_interval", "eval_rows", "checkpoint_interval", "device",
              "gradient_checkpointing", "folder", "run_id"}  # fmt: skip


def open_run(folder, config, digest, resume, overwrite):
    """The run in `folder`, new or as it is on disk, and the lock on it (see `Run.lock`).

    UserError where it exists and is not to be resumed, or would become another run.
    """
    if process()[0]:
        return Run(folder), contextlib.nullcontext()
    if is_pretrained(folder):
        raise UserError(f"{folder} holds weights in Hugging Face's layout, no run of ours; choose "
                        f"training.run_id=NAME")
    lock = Run.lock(folder)
    for path in [*folder.glob(".*.*.tmp"), *folder.glob("backup/.*.*.tmp")]:
        path.unlink()  # left by a process that was killed while it wrote
    begun, saved = (folder / "config.json").exists(), Run.has_checkpoint(folder)
    if overwrite and (begun or saved):  # damaged or not
        lock.close()
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(aside)
        say(f"the earlier run is now {aside}")
        lock, begun, saved = Run.lock(folder), False, False
    if begun or saved:
        run = Run(folder)  # UserError: it is damaged, or not ours
    if saved:
        state = run.state()
        if resume:
            check_same_run(run, config, digest)
            run.cut_metrics(state.metrics_bytes)
            return run, lock
        how = (f"is finished; evaluate it (python evaluate_gpt2.py --run {run})"
               if state.finished else f"exists; continue it with --resume {run}")
        raise UserError(f"run {run.name} {how}, train it anew with --overwrite (the old run is "
                        f"moved aside), or choose training.run_id=NAME")
    if resume:
        say(f"run {folder.name} has no checkpoint to resume from; it starts at the beginning")
    return Run.start(folder, config, digest), lock  # nothing that was saved is lost


def check_same_run(run, config, digest):
    """Refuse to resume a run under a configuration or on a text that would make it another run."""
    old, new, differing = run.config.tree(), config.tree(), []
    for section in new:
        for key in new[section]:
            if old[section][key] == new[section][key] or (section, key) == ("data", "folder"):
                continue
            text = f"{section}.{key} was {old[section][key]!r} and is now {new[section][key]!r}"
            if section == "training" and key in MAY_CHANGE:
                say(f"note: {text}")
            else:
                differing.append(text)
    if differing:
        raise UserError(f"{'; '.join(differing)}: --resume needs this as it was; to train it as "
                        f"it is now, choose training.run_id=NAME")
    if run.tokens_sha256 != digest:
        raise UserError(f"the training text has changed since run {run.name} began; put the old "
                        f"one back, or choose training.run_id=NAME")


@one_line_errors
def main(argv=None):
    parser = Parser(description="Train GPT-2 block by block by mask diffusion.")
    parser.add_argument("--config", default=DEFAULTS, help="default: gpt2.yaml")
    parser.add_argument("--preset", metavar="NAME", help="a preset of the config, e.g. tiny")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", nargs="?", const="", metavar="RUN",
                       help="go on where a run was stopped; named, it needs no other argument")
    group.add_argument("--overwrite", action="store_true", help="move an earlier run aside")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    if args.resume and "=" in args.resume:  # an override, and no run's name
        args.overrides.append(args.resume)
        args.resume = ""
    if args.resume:
        earlier = Run.named(args.resume)
        folder, stored = earlier.folder, (earlier.folder / "config.json", earlier.config.tree())
        config = load_config(args.config, args.preset, args.overrides, stored)
    else:
        config = load_config(args.config, args.preset, args.overrides)
        folder = user_path(config.training.folder) / config.training.run_id
    training = config.training
    device = start_processes(pick_device(training.device))
    stages = fusion_schedule(config.model, training)
    if min(stage.steps for stage in stages) < 1:
        raise UserError(f"training.max_steps={training.max_steps} leaves a block without a step")
    rows = training.batch_size * training.gradient_accumulation
    if rows % process()[1]:
        raise UserError(f"training.batch_size x gradient_accumulation = {rows} rows cannot be "
                        f"shared equally by {process()[1]} processes")
    with process_0_first():
        tokens, val_tokens, digest = load_tokens(config.data, config.model.vocab_size)
        pretrained = None
        if config.model.init_from != "scratch":
            source, cache = config.model.init_from, config.data.folder
            _, pretrained = read_pretrained(source, config.model, cache)
        val_rows = validation_rows(val_tokens, config.model.seq_len, training.eval_rows)
        batch_of(tokens, config.model, training, stages[0], 0)  # UserError: the text is too short
        run, lock = open_run(folder, config, digest, args.resume is not None, args.overwrite)
        run.config = config  # with what --resume may change
        model, state, optimizer_state = run.resume(device)
    with lock:
        if model is None:
            torch.manual_seed(1000 * training.seed)  # the embeddings'; the blocks' follow in `grow`
            model, optimizer_state = GPT(config.model, blocks=0).to(device), {}
            state = State()
        trainer = Trainer(run, stages, tokens, val_rows, pretrained, device, state)
        if state.finished and (run.folder / "eval.json").exists():
            say(f"run {run.name} is finished, nothing to resume; evaluate it (python "
                f"evaluate_gpt2.py --run {run}), or train it anew with --overwrite")
            return 0
        if state.finished:
            say("training is finished; only its evaluation is missing")
        elif state.stage or state.step:
            say(f"resuming in stage {state.stage} after step {state.step}")
        else:
            print_plan(trainer)
        signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                   if hasattr(signal, name)]  # fmt: skip
        handlers = {number: signal.signal(number, trainer.stop) for number in signals
                    if signal.getsignal(number) != signal.SIG_IGN}  # nohup: stays ignored
        try:
            finished = trainer.train(model, optimizer_state)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        number, _ = process()
        if dist.is_initialized():
            dist.destroy_process_group()  # process 0 evaluates alone
        if number:
            return 0 if finished else 130
        if not finished:
            say(f"stopped and saved in {run.folder}; go on with --resume {run}")
            return 130
        report(run, model, say=say)
    say(f"the run is in {run.folder}; python evaluate_gpt2.py --run {run} repeats its evaluation. "
        "Next:")
    for purpose, command in what_next(run, args):
        say(f"  {purpose}:\n    {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
