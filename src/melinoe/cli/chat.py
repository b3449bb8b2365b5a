"""`melinoe chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from melinoe.cli.options import (
    Adapter,
    Device,
    Memory,
    MinP,
    Model,
    Packed,
    Policy,
    Predictor,
    RepetitionPenalty,
    Slots,
    Sticky,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    Verify,
    check_choices,
    prepare,
    slots_format_of,
)
from melinoe.config import DEFAULT_POLICY, MAX_SEED
from melinoe.errors import MelinoeError

if TYPE_CHECKING:
    from melinoe.serving.conversation import Conversation

HELP = """/system TEXT   say who the model is to be; /system alone shows it
/stats         what the last answer cost: tokens, seconds, hit rate, bytes read
/clear         start a new conversation
/save FILE     add the conversation to FILE as a row that `melinoe tune --data` reads
/help          this text
/exit          leave (so does Ctrl-D)
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer."""


def chat(
    model: Model,
    adapter: Adapter = None,
    sticky: Sticky = None,
    predictor: Predictor = None,
    memory: Memory = None,
    slots: Slots = None,
    policy: Policy = DEFAULT_POLICY,
    device: Device = "cpu",
    packed: Packed = None,
    verify: Verify = False,
    system: System = "",
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of every answer; a fresh one if not given.", min=0, max=MAX_SEED)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of an answer; what the context leaves if not given.", min=1)
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of the whole conversation; 2048 at most if not given.", min=2)
    ] = None,
) -> None:
    """Talk to a model in the terminal; earlier turns are not computed again.

    /help shows what can be typed besides questions.
    """
    check_choices(memory, slots, policy, device)
    prepare(model, announce=True, device=device)
    from melinoe.models.folder import local_folder, resolve_model
    from melinoe.models.pretrained import read_config
    from melinoe.runtime.generation_settings import Sampling
    from melinoe.runtime.load import load, load_tokenizer
    from melinoe.serving.conversation import Conversation
    from melinoe.serving.engine.start import cached_tokens, context_tokens, start_engine
    from melinoe.serving.settings import ServeSettings

    settings = ServeSettings(concurrency=1, context=context)
    tokens = context_tokens(read_config(local_folder(resolve_model(model))), settings)
    loaded = load(
        model,
        adapter=adapter,
        sticky=sticky,
        predictor=predictor,
        memory=memory,
        slots=slots,
        policy=policy,
        device=device,
        slots_format=slots_format_of(packed),
        context=cached_tokens(tokens, settings),
        verify=verify,
    )
    tokenizer = load_tokenizer(model)
    engine = start_engine(loaded, tokenizer, settings)
    try:
        talk(
            Conversation(
                loaded,
                tokenizer,
                engine,
                system=system,
                sampling=Sampling(temperature, top_p, top_k, min_p, repetition_penalty),
                seed=seed,
                stops=tuple(stop or ()),
                max_new_tokens=max_new_tokens,
            )
        )
    finally:
        engine.stop()


def talk(conversation: Conversation) -> None:
    """Reads questions and commands from stdin until it ends; answers go to stdout, all else to stderr."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and history for input()
        _say("Type a question; /help shows more, Ctrl-D leaves.")
    with _CtrlC() as ctrl_c:
        while (text := _read("> " if interactive else "", ctrl_c)) is not None:
            if not text.strip():
                continue
            try:
                if text.startswith("/"):
                    if not command(conversation, text):
                        return
                    continue
                _answer(conversation, text, ctrl_c)
            except MelinoeError as error:
                _say(f"melinoe: {error}")


class _CtrlC:
    """Inside of it, Ctrl-C drops the line that is typed, and is a note otherwise, for whoever looks.

    As an exception it would come anywhere, in what ends an answer as well: pressed twice it ended the
    program, and pressed at one unlucky instruction it left the engine busy with an answer that was stopped.
    """

    def __enter__(self) -> Self:
        self.reading = self.pressed = False
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:  # who ignores it, as nohup does, goes on to
            signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, _number: int, _frame: object) -> None:
        self.pressed = True
        if self.reading:
            raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _read(prompt: str, ctrl_c: _CtrlC) -> str | None:
    """One question, of several lines where they end in a backslash; None at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            ctrl_c.reading = True
            line = input(prompt if not lines else "... " if prompt else "")
            ctrl_c.reading = False
        except EOFError:
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:  # as in a shell: drops what was typed
            ctrl_c.reading = False
            _say("")
            lines = []
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _answer(conversation: Conversation, text: str, ctrl_c: _CtrlC) -> None:
    ctrl_c.pressed = False
    for piece in conversation.ask(text, stopped=lambda: ctrl_c.pressed):
        print(piece, end="", flush=True)
    print(" [stopped]" if ctrl_c.pressed else "", flush=True)


def command(conversation: Conversation, text: str) -> bool:
    """Does what a line with a slash says; False: leave.

    Raises:
        MelinoeError: no such command, or a file that cannot be written.
    """
    name, _, rest = text[1:].strip().partition(" ")
    rest = rest.strip()
    if name in ("exit", "quit"):
        return False
    actions: dict[str, Callable[[], Any]] = {
        "help": lambda: _say(HELP),
        "clear": conversation.clear,
        "stats": lambda: _say(str(conversation.statistics or "nothing was asked yet")),
        "save": lambda: _save(conversation, rest),
        "system": lambda: _system(conversation, rest),
    }
    if name not in actions:
        raise MelinoeError(
            f"unknown command /{name}", allowed=", ".join(f"/{one}" for one in [*actions, "exit"])
        )
    actions[name]()
    return True


def _system(conversation: Conversation, text: str) -> None:
    if text:
        conversation.system = text
    _say(f"system: {conversation.system or '(none)'}")


def _save(conversation: Conversation, name: str) -> None:
    if not name:
        raise MelinoeError("/save needs the name of a file")
    if not conversation.turns:
        raise MelinoeError("nothing was said yet, there is nothing to save")
    line = json.dumps({"messages": conversation.messages}, ensure_ascii=False) + "\n"
    try:
        with Path(name).expanduser().open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise MelinoeError(f"cannot write {name}", got=error.strerror or error) from None
    _say(f"added to {name}")
