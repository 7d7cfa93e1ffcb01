"""Public implementations of memories in PyTorch, as programs of a `worker`.

Each is given the arrays that ours is, in the layout it likes best (made outside of what
is timed), and what comes out of it is brought back to ours.

`titans`: `titans_pytorch.NeuralMemory` through its own `forward`. Its projections are
replaced by slices, so that keys, values, queries and gates come from outside; heads are
rows of its batch; its memory model and its loss, both arguments of the class, are our
residual MLP and half the squared error. It differs from the paper: momentum and decay
act once a chunk of `store` tokens, on the sum of their gradients, and a query reads the
state at the end of the last whole chunk, its own token included. So queries are given
one token early, which makes every read that of the chunk's start.

`gated_delta`: `torch_chunk_gated_delta_rule` of the Qwen3-Next model in `transformers`.

Needs PyTorch and the package of the peer, NumPy, and nothing of ours.
"""

import gc
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

PACKAGES = {
    "titans-pytorch": "titans_pytorch",
    "transformers": "transformers.models.qwen3_next.modeling_qwen3_next",
}
Arrays = dict[str, np.ndarray]


class Peer(NamedTuple):
    """One implementation.

    Attributes:
      prepare: our inputs and the output's cotangent, in its layout.
      run: `tensors -> y`.
      restore: its outputs `y`, or the gradients of its inputs, in our layout.
    """

    prepare: Callable[[Arrays], Arrays]
    run: Callable[[dict[str, Any]], Any]
    restore: Callable[[Arrays], Arrays]


def versions() -> dict[str, str]:
    """Imports the packages that are installed here, so that no build has to.

    Raises:
      ModuleNotFoundError: PyTorch is not.
    """
    import torch

    found = {"torch": torch.__version__}
    for package, module in PACKAGES.items():
        try:
            importlib.import_module(module)
            found[package] = importlib.metadata.version(package)
        except ImportError:
            continue
    return found


def reset() -> None:
    """Forgets what was compiled."""
    import torch

    torch.compiler.reset()
    gc.collect()


def build(spec: dict[str, Any], arrays: Arrays):
    """A program, and what makes NumPy arrays in our layout of its outputs.

    Args:
      spec: `program`, `canary` or one of `PEERS`; its settings; `task`, `forward`,
        `training` or `decode`; whether it is `compiled`.
      arrays: its inputs and the `cotangent` of its output.
    """
    import torch

    # Every length is compiled for itself; without these the ninth would run eagerly.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if spec["program"] == "canary":
        a = torch.randn(spec["size"], spec["size"])
        return lambda: a @ a, lambda found: {}

    peer = PEERS[spec["program"]](spec)
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(array))
        for name, array in peer.prepare(arrays).items()
    }
    cotangent = tensors.pop("cotangent")
    if spec["task"] != "training":

        def forward():
            with torch.no_grad():
                return peer.run(tensors)

        return forward, lambda y: peer.restore({"y": y.numpy()})

    leaves = {name: x.requires_grad_() for name, x in tensors.items()}

    def training():
        loss = (peer.run(leaves) * cotangent).sum()
        return torch.autograd.grad(loss, list(leaves.values()))

    def gradients(found):
        return peer.restore(
            {name: x.numpy() for name, x in zip(leaves, found, strict=True)}
        )

    return training, gradients


def titans(spec: dict[str, Any]) -> Peer:
    """`NeuralMemory` of `store` tokens a chunk; gradients are taken at the start of the
    sequence (`anchor` None, its default) or every `anchor` tokens (its `batch_size`).

    Compiled: all of it, or, where a loop over anchors is in Python, its methods.
    """
    import torch
    import torch.nn.functional as F
    from tensordict import TensorDict
    from titans_pytorch import NeuralMemory
    from titans_pytorch.neural_memory import NeuralMemState
    from torch import nn

    rows, heads, width, store = (spec[n] for n in ("rows", "heads", "width", "store"))

    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            hidden = 4 * width
            self.w2 = nn.Parameter(torch.zeros(width, hidden), requires_grad=False)
            self.w1 = nn.Parameter(torch.zeros(hidden, width), requires_grad=False)

        def forward(self, x):
            return x + F.gelu(x @ self.w2, approximate="tanh") @ self.w1

    class Slice(nn.Module):
        def __init__(self, take):
            super().__init__()
            self.take = take

        def forward(self, x):
            return self.take(x)

    memory = NeuralMemory(
        width,
        chunk_size=store,
        batch_size=spec["anchor"],
        model=Memory(),
        mem_model_norm_add_residual=False,
        pre_rmsnorm=False,
        qkv_receives_diff_views=True,
        adaptive_step_transform=lambda eta: eta,
        store_memory_loss_fn=lambda y, v: 0.5 * (y - v).pow(2).sum(dim=-1),
    ).requires_grad_(False)
    vector = Slice(lambda x: x[..., :width])
    memory.to_queries = memory.to_keys = memory.to_values = vector
    memory.to_adaptive_step = Slice(lambda x: x[..., width])
    memory.to_decay_factor = Slice(lambda x: x[..., width + 1 : width + 2])
    memory.to_momentum = Slice(lambda x: x[..., width + 2 :].unsqueeze(0))

    def whole(sequence, state):
        return memory(sequence, state=state)

    if spec["compiled"] and spec["anchor"] is None:
        whole = torch.compile(whole, dynamic=False)
    elif spec["compiled"]:
        store_memories = torch.compile(memory.store_memories, dynamic=False)

        def store_anywhere(*arguments, seq_index, **more):
            # The place in the sequence is only counted: as a constant of the program
            # it would have each anchor's tokens compiled anew.
            updates, state, surprises = store_memories(*arguments, **more)
            moved = state._replace(seq_index=state.seq_index + seq_index)
            return updates, moved, surprises

        memory.store_memories = store_anywhere
        memory.retrieve_memories = torch.compile(
            memory.retrieve_memories, dynamic=False
        )

    def prepare(arrays):
        flat = {
            name: arrays[name].reshape(rows * heads, -1, *arrays[name].shape[3:])
            for name in ("k", "v", "q", "eta", "decay", "momentum", "cotangent")
        }
        gates = [
            flat["eta"],
            *(np.repeat(flat[name], store, axis=1) for name in ("decay", "momentum")),
        ]
        nothing = np.zeros((*flat["q"].shape[:2], 3), np.float32)
        views = (
            np.concatenate([early(flat["q"]), nothing], axis=-1),
            np.concatenate([flat["k"], np.stack(gates, axis=-1)], axis=-1),
            np.concatenate([flat["v"], nothing], axis=-1),
        )
        return {
            "sequence": np.stack(views),
            "w1": arrays["w1"].swapaxes(1, 2),
            "w2": arrays["w2"].swapaxes(1, 2),
            "cotangent": early(flat["cotangent"]),
        }

    def early(x):
        return np.roll(x, -1, axis=1) if spec["early"] else x

    def late(x):
        return np.roll(x, 1, axis=1) if spec["early"] else x

    def run(tensors):
        weights = TensorDict(
            {name: tensors[name].repeat(rows, 1, 1) for name in ("w1", "w2")}
        )
        state = NeuralMemState(0, weights, None, None, None)
        sequence = tensors["sequence"]
        if spec["task"] != "decode":
            return whole(sequence, state)[0]
        outputs = []
        for t in range(sequence.shape[2]):
            y, state = whole(sequence[:, :, t : t + 1], state)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    def restore(found):
        def heads_apart(x):
            return x.reshape(rows, heads, *x.shape[1:])

        if "y" in found:
            return {"y": heads_apart(late(found["y"]))}
        queries, keys, values = found["sequence"]

        def pooled(gate):
            return gate.reshape(rows, heads, -1, store).sum(axis=-1)

        return {
            "q": heads_apart(late(queries[..., :width])),
            "k": heads_apart(keys[..., :width]),
            "v": heads_apart(values[..., :width]),
            "eta": heads_apart(keys[..., width]),
            "decay": pooled(keys[..., width + 1]),
            "momentum": pooled(keys[..., width + 2]),
            "w1": found["w1"].swapaxes(1, 2),
            "w2": found["w2"].swapaxes(1, 2),
        }

    return Peer(prepare, run, restore)


def gated_delta(spec: dict[str, Any]) -> Peer:
    """Chunks of `chunk` tokens; queries are given undone of the scale that it applies,
    the state transposed."""
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next

    rows, scale = spec["rows"], spec["width"] ** 0.5
    rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
    if spec["compiled"]:
        rule = torch.compile(rule, dynamic=False)

    def swapped(arrays):
        return {
            name: x.swapaxes(1, 2) * (scale if name == "q" else 1.0)
            for name, x in arrays.items()
        }

    def run(tensors):
        y, _ = rule(
            *(tensors[name] for name in ("q", "k", "v", "decay", "eta")),
            chunk_size=spec["chunk"],
            initial_state=tensors["w"].repeat(rows, 1, 1, 1),
        )
        return y

    return Peer(swapped, run, swapped)


PEERS = {"titans": titans, "gated_delta": gated_delta}
