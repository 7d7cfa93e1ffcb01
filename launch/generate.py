"""Goes on from a prompt, with a trained model: text as it is made.

    python -m launch.generate --checkpoint=runs/quickstart/hope --prompt="import "

The model's memory learns from the prompt and from its own text; --frozen stops that.
"""

import contextlib
import sys
import time
from collections.abc import Iterable, Sequence

import jax

from hope_jax.data.tokenizer import Tokenizer
from hope_jax.stream.generate import Sampling, as_text, generate
from launch import command
from launch.evaluate import define_checkpoint, fail_in_words, open_given


def _define(define) -> None:
    define_checkpoint(define)
    define.string("prompt", "", "text to go on from")
    define_sampling(define)
    define.bool("frozen", False, "no level moves while reading")


def define_sampling(define) -> None:
    """The flags of how tokens are drawn, and how many."""
    define.integer("tokens", 256, "most tokens to make")
    define.float("temperature", 0.8, "0 takes the likeliest token")
    define.integer("top_k", None, "draw among this many likeliest tokens only")
    define.float("top_p", 1.0, "among the fewest with this probability together")
    define.float("min_p", 0.0, "among those with this share of the likeliest one's")
    define.multi_string("stop", [], "a text that ends the text; may be repeated")
    define.integer("seed", 0, "of the draws", lower_bound=0, upper_bound=2**32 - 1)


def sampling_of(options) -> Sampling:
    """What those flags say."""
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        stop=tuple(options.stop),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the prompt and what comes after it."""
    options = command.parse(__doc__, _define, arguments)
    command.quiet_libraries()
    with fail_in_words():
        sampling = sampling_of(options)
        opened = open_given(options)
        ids = generate(
            opened.reader,
            opened.params,
            opened.tokenizer,
            options.prompt.encode("utf-8", "surrogateescape"),
            tokens=options.tokens,
            key=jax.random.key(options.seed),
            sampling=sampling,
            learn=not options.frozen,
        )
    with contextlib.suppress(KeyboardInterrupt):
        write(options.prompt, ids, opened.tokenizer)


def write(prompt: str, ids: Iterable[int], tokenizer: Tokenizer) -> None:
    """Prints `prompt` and the text of `ids` as it comes; the speed to stderr."""
    sys.stdout.write(command.printable(prompt, sys.stdout))
    sys.stdout.flush()
    made, start = 0, 0.0

    def counted():
        nonlocal made, start
        for token in ids:
            start = start or time.perf_counter()  # what came before it is compilation
            made += 1
            yield token

    for text in as_text(tokenizer, counted()):
        sys.stdout.write(command.printable(text, sys.stdout))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if made > 1:
        speed = made / (time.perf_counter() - start)
        print(f"[{made} tokens, {speed:,.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    command.run(main)
