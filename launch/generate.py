"""Goes on from a prompt, with a trained model: text as it is made.

    python -m launch.generate --checkpoint=runs/quickstart/hope --prompt="import "

The model's memory learns from the prompt and from its own text; --frozen stops that.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Sequence

import jax

from hope_jax.data.tokenizer import Tokenizer
from hope_jax.stream.generate import Sampling, as_text, generate
from hope_jax.stream.reader import open_checkpoint
from launch.evaluate import add_checkpoint_arguments, fail_in_words, quiet_libraries


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--prompt", default="", help="text to go on from")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens to make")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token"
    )
    parser.add_argument(
        "--top_k", type=int, help="draw among this many likeliest tokens only"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument(
        "--frozen", action="store_true", help="no level moves while reading"
    )
    options = parser.parse_args(arguments)

    quiet_libraries()
    with fail_in_words():
        sampling = Sampling(temperature=options.temperature, top_k=options.top_k)
        opened = open_checkpoint(options.checkpoint, options.set)
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
    sys.stdout.write(prompt)
    sys.stdout.flush()
    made, start = 0, None

    def counted():
        nonlocal made, start
        for token in ids:
            start = start or time.perf_counter()  # what came before it is compilation
            made += 1
            yield token

    for text in as_text(tokenizer, counted()):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if made > 1:
        speed = made / (time.perf_counter() - start)
        print(f"[{made} tokens, {speed:,.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    main()
