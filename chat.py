"""Chat with a trained model in the terminal.

    python chat.py out-chat                                   # an out_dir, a checkpoint, a Hugging Face folder, gpt2
    python chat.py out-chat/ckpt.pt --temperature=0.2 --prompt="What is 3 plus 4?"      # a single answer
    python chat.py block_size=64/withemotion/ckpt.pt --template=eds-emotion             # a file of EDS
    printf 'Hello\\nHow are you?\\n' | python chat.py out-chat             # one line per turn and per answer

/help lists the commands. Ctrl-C ends an answer where it is, Ctrl-D leaves.
"""

import contextlib
import json
import os
import sys
import unicodedata
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import configurator
from configurator import UserError
from dongpt import runtime
from dongpt.chat.conversation import Conversation
from dongpt.chat.dialogues import Messages, read_json_lines
from dongpt.decode import ready
from dongpt.decode.ready import Quantization
from dongpt.decode.sampling import DecodingError, Sampling
from dongpt.program import atomic_write, locked_output, run_program
from dongpt.runtime import RuntimeConfig
from dongpt.text.documents import Files
from dongpt.text.template import EMOTIONS, PLAIN_TEMPLATE, TEMPLATES

HELP = """\
/help            this list
/reset           forget what was said
/system TEXT     begin the conversation with TEXT
/temperature X   0 is the likeliest answer, 1 a free one
/save FILE       write down what was said
/load FILE       go on from what was saved
/quit            leave, as Ctrl-D does
Ctrl-C ends an answer."""
BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # change the direction of the text after them


@dataclass(frozen=True)
class ChatConfig(RuntimeConfig, Sampling):
    out_dir: str = ""  # the model, where no path is given: a checkpoint, a run's folder, a Hugging Face folder, gpt2
    template: Literal["auto", "dongpt", "eds", "eds-emotion", "eds-context", "plain"] = "auto"  # auto: the model's own
    prompt: str = ""  # ask this, print the answer and end
    system: str = ""  # what the conversation begins with, for models that were trained with such texts
    emotion: str = ""  # eds-emotion: the feeling that the conversation is about; without it, it is guessed
    context: str = ""  # eds-context: the situation that the conversation is about
    max_new_tokens: Annotated[int, ">=", 1] = 200  # maximum length of an answer
    temperature: float = 0.7  # below 1 favors likely tokens, above 1 is more random; 0 takes the likeliest token
    top_k: int | None = 50  # draw from this many likeliest tokens; 0 or None is off
    quantize: Quantization = "none"  # int8: weights of one byte, on a CPU faster; README says what loss it costs

    def __post_init__(self):
        super().__post_init__()
        if self.emotion and self.emotion not in EMOTIONS:
            raise UserError(f"emotion={self.emotion} is none of {', '.join(EMOTIONS)}")


def print_note(sentence: str):
    """Print a note for the user, which is not part of an answer, on stderr."""
    sys.stdout.flush()
    print(sentence, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """text without control characters and marks of direction, which could garble a terminal; \\n and \\t stay."""
    control_chars = {c for c in text if unicodedata.category(c) in ("Cc", "Cs") or c in BIDI_CONTROLS} - {"\n", "\t"}
    return "".join(c for c in text if c not in control_chars)


def is_interactive() -> bool:
    """Whether a person types and reads on a terminal."""
    return bool(sys.stdin and sys.stdin.isatty() and sys.stdout.isatty())


class Chat:
    """Reads lines and prints answers: on a terminal piece by piece, elsewhere one line per answer."""

    def __init__(self, conversation: Conversation):
        self.conversation, self.is_interactive = conversation, is_interactive()
        commands = self.help, self.reset, self.system, self.temperature, self.save, self.load
        self.commands = {command.__name__: command for command in commands}

    def run(self) -> int:
        """Answer lines until there are no more, or until /quit; returns the exit code."""
        while (line := self.read_line()) is not None:
            raw_line, line = line.strip(), printable(line).strip()
            command, _, argument = line[1:].partition(" ")
            if raw_line and not line:
                print_note("there is nothing in that line that can be read")
            elif line in ("/quit", "/exit"):
                return 0
            elif line.startswith("/"):
                self.run_command(command, argument.strip())
            elif line and (exit_code := self.answer(line)):
                return exit_code
        return 0

    def read_line(self) -> str | None:
        """The next line, or None at the end of the input."""
        while True:
            try:
                if self.is_interactive:
                    return input("You: ")
                return sys.stdin.readline() or None if sys.stdin else None  # stdin is None if it is closed
            except EOFError:
                print(flush=True)
                return None
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                print_note("\n(Ctrl-D leaves)")

    def answer(self, line: str, verbatim: bool = False) -> int:
        """Print the model's answer; returns an exit code if the program has to end, else 0. With verbatim the answer
        keeps its line ends, also if it isn't printed on a terminal."""
        pieces, output = self.conversation.reply(line), []
        is_streaming = self.is_interactive or verbatim
        prefix = "Bot: " if self.is_interactive and not verbatim else ""
        with runtime.Interrupts() as interrupts:
            try:
                for piece in pieces:
                    output.append(printable(piece))
                    if is_streaming and output[-1]:
                        print(prefix + output[-1], end="", flush=True)
                        prefix = ""
                    if interrupts.exit_code:
                        break
            finally:
                pieces.close()
                # the name for an empty answer; one line per answer for programs that read them
                print(prefix if is_streaming else " ".join("".join(output).split()), flush=True)
        is_only_this_answer = self.is_interactive and interrupts.exit_code == 130  # Ctrl-C does not end the chat
        return 0 if is_only_this_answer else interrupts.exit_code

    def run_command(self, name: str, argument: str):
        """Run the command /name; an error in it is a note."""
        if name not in self.commands:
            print_note(f"there is no /{name}: /help lists the commands")
            return
        try:
            print_note(self.commands[name](argument))
        except UserError as error:
            print_note(f"/{name}: {error}")

    # ------------------------------------------------------------------------------------------------------------------
    # commands: each returns what it has to say

    def help(self, argument: str) -> str:
        return HELP

    def reset(self, argument: str) -> str:
        self.conversation.reset()
        return "forgotten"

    def system(self, text: str) -> str:
        self.conversation.set_system(text)
        return f"the conversation begins with {'that' if text else 'no such text'} now"

    def temperature(self, text: str) -> str:
        try:
            self.conversation.sampling = replace(self.conversation.sampling, temperature=float(text))
        except DecodingError as error:
            raise UserError(str(error)) from None
        except ValueError:
            raise UserError(f"{text!r} is no number: write one such as /temperature 0.5") from None
        return f"temperature is {self.conversation.sampling.temperature:g}"

    def save(self, path: str) -> str:
        messages = self.conversation.messages()
        if not path or not messages:
            raise UserError("name a file, as in /save talk.jsonl" if messages else "nothing was said so far")
        path = os.path.expanduser(path)
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder: name a file")
        if os.path.isfile(path):
            try:
                read_conversations(path)
            except UserError:
                raise UserError(f"{path} is there already, and is no conversation: take another name") from None
        lines = [json.dumps({"role": role, "content": content}, ensure_ascii=False) for role, content in messages]
        try:
            with locked_output(path), atomic_write(path, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{line}\n" for line in lines)
        except (OSError, UnicodeError) as error:  # UnicodeError: halves of surrogate pairs in what was typed
            raise UserError(f"{path} could not be written ({error}): take another name") from error
        return f"{len(messages):,} messages are in {path}"

    def load(self, path: str) -> str:
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise UserError(f"there is no file {path!r}: name one, as in /load talk.jsonl")
        conversations = read_conversations(path)
        if len(conversations) != 1:
            raise UserError(f"{path} holds {len(conversations):,} conversations: name a file with one")
        self.conversation.restore(conversations[0])
        return f"{len(conversations[0]):,} messages from {path}"


def read_conversations(path: str) -> list[Messages]:
    """The conversations in a file. Raises UserError that names the line if it has another format."""
    return [*read_json_lines(Files([path]).lines(path), path)]


def start_conversation(cfg: ChatConfig, path: str) -> Conversation:
    """A conversation with the model at path, with the settings' system text and header."""
    # A template that was chosen is used even if the checkpoint's own is one that this version does not know
    generator = ready.load(path, cfg.device, cfg.dtype, cfg.quantize, cfg.compile, chat_template=cfg.template == "auto")
    tokenizer = generator.require_tokenizer()
    template = (tokenizer.template or PLAIN_TEMPLATE) if cfg.template == "auto" else TEMPLATES[cfg.template]
    print_note(generator.description)
    settings = print_note, cfg.max_new_tokens, cfg.seed
    conversation = Conversation(generator.model, tokenizer, template, cfg, *settings)  # a ChatConfig is a Sampling
    if cfg.template == "auto" and not tokenizer.template:
        hint = "(for files of EDS pass --template=eds, eds-emotion or eds-context)"
        print_note(f"{path} was not trained on conversations: it goes on with what you write {hint}")
    texts = cfg.system, choose_topic(cfg, template.name)
    for option, text, set_text in zip(("system", "context"), texts, (conversation.set_system, conversation.set_topic)):
        try:
            set_text(text)
        except UserError as error:
            raise UserError(f"--{option}: {error}") from None
    return conversation


def choose_topic(cfg: ChatConfig, template: str) -> str:
    """The emotion or context that EDS's templates put into their header: as set, or asked for on a terminal."""
    for name in ("emotion", "context"):
        if getattr(cfg, name) and template != f"eds-{name}":
            raise UserError(f"--{name} belongs to --template=eds-{name}: pass that too, or drop it")
    topic, question = printable(cfg.context), "What is the situation? (Enter for none) "
    if template == "eds-emotion":
        topic, question = cfg.emotion, f"Which feeling? One of {', '.join(EMOTIONS)} (Enter to have it guessed) "
    if topic or cfg.prompt or template not in ("eds-emotion", "eds-context") or not is_interactive():
        return topic
    try:
        topic = printable(input(question)).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""
    if template == "eds-emotion" and topic and topic not in EMOTIONS:
        print_note(f"{topic} is none of them, so it is guessed")
        return ""
    return topic


def main(argv: list[str] | None = None) -> int:
    cfg, given, paths = configurator.load_with_paths(ChatConfig, argv, "[CHECKPOINT]")
    if paths and cfg.out_dir:
        raise UserError(f"two models, {paths[0]} and --out_dir={cfg.out_dir}: name one")
    path = "".join(paths) or cfg.out_dir
    if not path:
        raise UserError("no model was given: python chat.py PATH of a checkpoint, of a run's folder, or gpt2")
    prompt = printable(cfg.prompt).strip()
    if "prompt" in given and not prompt:
        raise UserError("--prompt is empty: write your question, or drop it to talk")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if is_interactive():  # elsewhere readline may write escape sequences to stdout
        with contextlib.suppress(ImportError):  # lets input() edit and recall lines; on Windows the console does
            import readline  # noqa: F401
    chat = Chat(start_conversation(cfg, path))
    if prompt:
        return chat.answer(prompt, verbatim=True)
    if chat.is_interactive:
        print_note("/help lists the commands, Ctrl-D leaves")
    return chat.run()


if __name__ == "__main__":
    run_program(main)
