"""Maps a verb to its module. Nothing heavy is imported before a verb is known."""

import sys
from importlib import import_module

from strop import __version__

VERBS = {
    "run": "answer one prompt, streamed to the terminal",
    "serve": "answer OpenAI's clients over HTTP",
    "keys": "make an API key for a server",
    "chat": "a conversation in the terminal, or one line in and one answer out",
    "embed": "vectors of texts, from an encoder or a decoder, as JSON lines",
    "bench": "measure a model on this machine, beside other engines",
    "bench serve": "load on an OpenAI-compatible server: latencies, throughput, goodput, cost",
    "eval": "perplexity of a model, and its distance from a reference model",
    "plan": "how to run a model on hardware: latency, cost, memory, and what binds",
    "inspect": "what a model file holds, takes, and could reach here, without loading it",
    "models": "what is cached, and removing it",
}

_USAGE = f"""strop {__version__}: hones a language model to the machine it runs on.

usage: strop VERB ...        strop VERB --help for a verb's options

{chr(10).join(f"  {verb:11} {what}" for verb, what in VERBS.items())}
"""


def main() -> None:
    """Entry point of the command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_USAGE)
        return
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return
    verb = " ".join(arguments[:2])  # some have two words
    if verb not in VERBS:
        verb = arguments[0]
    if verb not in VERBS:
        print(f"strop: no verb {verb!r}; verbs are {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    from strop.cli.verb import run_verb

    run_verb(import_module(f"strop.cli.{verb.replace(' ', '_')}").command, arguments[len(verb.split()) :])
