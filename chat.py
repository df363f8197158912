"""A conversation with a trained model in the terminal.

    python chat.py out-chat                                   # an out_dir, a checkpoint, a Hugging Face folder, gpt2
    python chat.py out-chat/ckpt.pt --temperature=0.2 --prompt="What is 3 plus 4?"      # one answer, and done
    python chat.py block_size=64/withemotion/ckpt.pt --template=eds-emotion             # a file of EDS
    printf 'Hello\\nHow are you?\\n' | python chat.py out-chat             # a line a turn, a line an answer

/help lists the commands. Ctrl-C ends an answer where it is, Ctrl-D leaves.
"""

import contextlib
import json
import os
import sys
import unicodedata
from dataclasses import dataclass, fields, replace
from typing import Literal

import configurator
from configurator import UserError
from dongpt import runtime
from dongpt.chat.conversation import Conversation
from dongpt.chat.dialogues import Messages, read_json_lines
from dongpt.checkpoint.files import load_anything
from dongpt.decode.ready import Quantize, to_inference
from dongpt.decode.sampling import Sampling
from dongpt.program import run_program
from dongpt.runtime import RuntimeConfig
from dongpt.text.documents import Files
from dongpt.text.template import EMOTIONS, PLAIN, PRESETS
from dongpt.text.tokenizers import from_dict

HELP = """\
/help            this list
/reset           forget what was said
/system TEXT     begin the conversation with TEXT
/temperature X   0 is the likeliest answer, 1 a free one
/save FILE       write down what was said
/load FILE       go on from what was saved
/quit            leave, as Ctrl-D does
Ctrl-C ends an answer."""
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the marks of bidirectional text


@dataclass(frozen=True)
class ChatConfig(RuntimeConfig, Sampling):
    out_dir: str = ""  # the model, where no path is given: a checkpoint, a run's folder, a Hugging Face folder, gpt2
    template: Literal["auto", "dongpt", "eds", "eds-emotion", "eds-context", "plain"] = "auto"  # auto: the model's own
    prompt: str = ""  # ask this, print the answer and end
    system: str = ""  # what the conversation begins with, for models that were trained with such texts
    emotion: str = ""  # eds-emotion: the feeling that the conversation is about; without it, it is guessed
    context: str = ""  # eds-context: the situation that the conversation is about
    max_new_tokens: int = 200  # length of an answer that does not end before
    temperature: float = 0.7  # below 1 bolder on the likely, above 1 more random; 0 takes the likeliest token
    top_k: int | None = 50  # draw from this many likeliest tokens; 0 or None is off
    quantize: Quantize = "none"  # int8: weights of one byte, on a CPU faster; README says what loss it costs

    def __post_init__(self):
        problems = [f"max_new_tokens={self.max_new_tokens} must be at least 1"] if self.max_new_tokens < 1 else []
        if self.emotion and self.emotion not in EMOTIONS:
            problems.append(f"emotion={self.emotion} is none of {', '.join(EMOTIONS)}")
        if problems := problems + self.problems():
            raise UserError("; ".join(problems))


def note(sentence: str):
    """Tell the user something that is no answer."""
    sys.stdout.flush()
    print(sentence, file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """text without what moves a cursor, turns the writing round or is no character; line ends and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") and c not in TURNING)


class Chat:
    """Lines in, answers out. On a terminal answers come piece by piece; elsewhere each is a line of its own."""

    def __init__(self, conversation: Conversation):
        self.conversation = conversation
        self.live = on_a_terminal()

    def run(self) -> int:
        """Take lines until they end or one says /quit; returns the exit code."""
        while (line := self.read()) is not None:
            typed, line = line.strip(), visible(line).strip()
            if typed and not line:
                note("there is nothing in that line that can be read")
            elif line.startswith("/"):
                name, *rest = line[1:].split(maxsplit=1) or [""]
                if name in ("quit", "exit"):
                    return 0
                self.obey(name, "".join(rest))
            elif line:
                if code := self.answer(line):
                    return code
        return 0

    def read(self) -> str | None:
        """The next line; None when there is none."""
        while True:
            try:
                if self.live:
                    return input("You: ")
                return sys.stdin.readline() or None if sys.stdin else None  # None where it is closed
            except EOFError:
                print(flush=True)
                return None
            except KeyboardInterrupt:
                if not self.live:
                    raise
                note("\n(Ctrl-D leaves)")

    def answer(self, line: str, as_it_is: bool = False) -> int:
        """Say what the model answers; an exit code if the program is to end with it, else 0."""
        pieces, said = self.conversation.reply(line), []
        as_it_comes = self.live or as_it_is
        name = "Bot: " if self.live and not as_it_is else ""
        with runtime.Interrupts() as interrupts:
            try:
                for piece in pieces:
                    said.append(visible(piece))
                    if as_it_comes and said[-1]:
                        print(name + said[-1], end="", flush=True)
                        name = ""
                    if interrupts.code:
                        break
            finally:
                pieces.close()
                print(name, end="")  # where nothing was said
                if not as_it_comes:  # a line for each answer, so that a program can read them
                    print(" ".join("".join(said).split()), end="")
                print(flush=True)
        return interrupts.code if interrupts.code and not (self.live and interrupts.code == 130) else 0

    def obey(self, name: str, rest: str):
        """Carry out a command."""
        commands = {
            "help": self.help,
            "reset": self.reset,
            "system": self.system,
            "temperature": self.temperature,
            "save": self.save,
            "load": self.load,
        }
        if name not in commands:
            note(f"there is no /{name}: /help lists the commands")
            return
        try:
            commands[name](rest)
        except (ValueError, OSError) as error:
            note(f"/{name}: {error}")

    def help(self, rest: str):
        note(HELP)

    def reset(self, rest: str):
        self.conversation.reset()
        note("forgotten")

    def system(self, text: str):
        self.conversation.begin_with(text)
        note("the conversation begins with that now" if text else "the conversation begins with no such text now")

    def temperature(self, text: str):
        try:
            sampling = replace(self.conversation.sampling, temperature=float(text))
        except ValueError:
            raise UserError(f"{text!r} is no number: write one such as /temperature 0.5") from None
        if problems := sampling.problems():
            raise UserError(problems[0])
        self.conversation.sampling = sampling
        note(f"temperature is {sampling.temperature:g}")

    def save(self, path: str):
        messages = self.conversation.messages()
        if not path or not messages:
            raise UserError("name a file, as in /save talk.jsonl" if messages else "nothing was said so far")
        path = os.path.expanduser(path)
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder: name a file")
        if os.path.isfile(path):
            try:
                saved_before(path)
            except ValueError:
                raise UserError(f"{path} is there already, and is no conversation: take another name") from None
        with open(path + ".part", "w", encoding="utf-8", newline="\n") as file:
            for role, content in messages:
                file.write(json.dumps({"role": role, "content": content}, ensure_ascii=False) + "\n")
        os.replace(path + ".part", path)
        note(f"{len(messages):,} messages are in {path}")

    def load(self, path: str):
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise UserError(f"there is no file {path!r}: name one, as in /load talk.jsonl")
        conversations = saved_before(path)
        if len(conversations) != 1:
            raise UserError(f"{path} holds {len(conversations):,} conversations: name a file with one")
        self.conversation.replace_by(conversations[0])
        note(f"{len(conversations[0]):,} messages from {path}")


def saved_before(path: str) -> list[Messages]:
    """The conversations in a file. Raises UserError, naming the line, for what is none."""
    return [*read_json_lines(Files([path]).lines(path), path)]


def on_a_terminal() -> bool:
    """Whether somebody types and reads."""
    return bool(sys.stdin and sys.stdin.isatty() and sys.stdout.isatty())


def edit_lines():
    """Have input() edit lines and remember them, where Python can."""
    with contextlib.suppress(ImportError):  # on Windows the console does it
        import readline  # noqa: F401


def begin(cfg: ChatConfig, path: str) -> Conversation:
    """The model ready to talk."""
    rt = runtime.start(cfg.device, cfg.dtype)
    model, description, _ = load_anything(path)
    if description is None:
        raise UserError(
            f"{path} holds no tokenizer, so it cannot read: put the meta.pkl or meta.json of its data beside it"
        )
    if cfg.template != "auto":  # the file's own may be one that is not known here
        description = {key: value for key, value in description.items() if key != "template"}
    tokenizer = from_dict(description)
    template = (tokenizer.template or PLAIN) if cfg.template == "auto" else PRESETS[cfg.template]
    sampling = Sampling(**{field.name: getattr(cfg, field.name) for field in fields(Sampling)})
    model, why = to_inference(model, rt, cfg.dtype, cfg.quantize, cfg.compile)
    note(why)
    conversation = Conversation(model, tokenizer, template, sampling, note, cfg.max_new_tokens, cfg.seed)
    if cfg.template == "auto" and not tokenizer.template:
        note(
            f"{path} was not trained on conversations: it goes on with what you write (for files of EDS pass "
            f"--template=eds, eds-emotion or eds-context)"
        )
    try:
        conversation.begin_with(cfg.system)
    except ValueError as error:
        raise UserError(f"--system: {error}") from None
    situation = about(cfg, template.name)
    try:
        conversation.talk_about(situation)
    except ValueError as error:
        raise UserError(f"--context: {error}") from None
    return conversation


def about(cfg: ChatConfig, template: str) -> str:
    """What fills the header of EDS's templates: as set, or asked for once on a terminal."""
    for name in ("emotion", "context"):
        if getattr(cfg, name) and template != f"eds-{name}":
            raise UserError(f"--{name} belongs to --template=eds-{name}: pass that too, or leave it away")
    if template not in ("eds-emotion", "eds-context"):
        return ""
    known, question = visible(cfg.context), "What is the situation? (Enter for none) "
    if template == "eds-emotion":
        known, question = cfg.emotion, f"Which feeling? One of {', '.join(EMOTIONS)} (Enter to have it guessed) "
    if known or cfg.prompt or not on_a_terminal():
        return known
    try:
        answer = visible(input(question)).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""
    if template == "eds-emotion" and answer and answer not in EMOTIONS:
        note(f"{answer} is none of them, so it is guessed")
        return ""
    return answer


def main(argv: list[str] | None = None) -> int:
    cfg, given, paths = configurator.load_with_paths(ChatConfig, argv, "[PATH]")
    if paths and cfg.out_dir:
        raise UserError(f"two models, {paths[0]} and --out_dir={cfg.out_dir}: name one")
    path = "".join(paths) or cfg.out_dir
    if not path:
        raise UserError("no model was given: python chat.py PATH of a checkpoint, of a run's folder, or gpt2")
    prompt = visible(cfg.prompt).strip()
    if "prompt" in given and not prompt:
        raise UserError("--prompt is empty: write what you want to ask, or leave it away to talk")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if on_a_terminal():  # readline may write to a terminal's output even where that is a file
        edit_lines()
    chat = Chat(begin(cfg, path))
    if prompt:
        return chat.answer(prompt, as_it_is=True)
    if chat.live:
        note("/help lists the commands, Ctrl-D leaves")
    return chat.run()


if __name__ == "__main__":
    run_program(main)
