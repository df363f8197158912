"""Chat with a trained model in the terminal.

    python chat.py out-chat-demo                                # or a checkpoint, a Hugging Face folder, gpt2
    python chat.py out-chat-demo --temperature=0.2 --prompt="What is 3 plus 4?"         # a single answer
    printf 'Hello\\nHow are you?\\n' | python chat.py out-chat-demo       # one line per message and per answer
    python chat.py ckpt.pt --template=eds-emotion               # a model trained on text tagged with <bot> and <human>

On a terminal, lines can be edited and recalled. /help lists the commands, Ctrl-C stops an answer, and Ctrl-D exits.
"""

import sys

if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["-h"], ["--help"], ["--version"]):
        print("loading PyTorch", file=sys.stderr, flush=True)  # takes seconds, in which nothing else would be shown

import contextlib
import json
import os
import time
import unicodedata
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import configurator
from configurator import UserError
from dongpt import runtime
from dongpt.chat.conversation import Conversation
from dongpt.chat.reading import Dialogues
from dongpt.chat.terminal import Terminal, open_terminal
from dongpt.decode import ready
from dongpt.decode.ready import Quantization
from dongpt.decode.sampling import DecodingError, Sampling
from dongpt.decode.text import read_prompt
from dongpt.program import atomic_write, locked_output, run_program
from dongpt.runtime import RuntimeConfig
from dongpt.text.documents import Files
from dongpt.text.template import EMOTIONS, PLAIN_TEMPLATE, TEMPLATES

HELP = """\
/help            show this list
/retry           get another answer to your last message
/undo            remove your last message and its answer
/reset           start a new conversation
/system TEXT     set the system message, for models trained with system messages
/temperature X   set the temperature: 0 always gives the most likely answer; higher values give more varied ones
/save FILE       save the conversation
/load FILE       continue a saved conversation
/quit            exit (or press Ctrl-D)
Ctrl-C stops an answer."""
HELP_KEYS = "Alt-Enter, or a backslash at the end of a line, starts a new line. The up arrow recalls earlier messages."
BASE_MODEL_NOTE = """\
This model was not trained on conversations: instead of answering, it continues the text that you type, as in sample.py.
To train a model that answers, run: python train.py config/train_chat_demo.py"""
HISTORY_PATH = "~/.dongpt_history"
BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # change the direction of the following text

TemplateName = Literal["auto", "dongpt", "eds", "eds-emotion", "eds-context", "plain"]


@dataclass(frozen=True)
class ChatConfig(RuntimeConfig, Sampling):
    out_dir: str = ""  # model if no CHECKPOINT is given: a run's folder, a checkpoint, a Hugging Face folder, or gpt2
    template: TemplateName = "auto"  # message format; auto: as in training; eds: <bot> and <human> tags; plain: no tags
    prompt: str = ""  # answer only this message, or the one in FILE:path, and exit
    start: str = ""  # another name for --prompt
    system: str = ""  # system message at the start of the conversation, for models trained with system messages
    emotion: str = ""  # eds-emotion: the emotion that the conversation is about; if empty, the model guesses it
    context: str = ""  # eds-context: the situation that the conversation is about
    max_new_tokens: Annotated[int, ">=", 1] = 200  # maximum length of an answer in tokens
    temperature: float = 0.7  # above 1 is more random; 0, the default for chat models, picks the most likely token
    top_k: int | None = 50  # sample only from the top_k most likely tokens; 0 or None disables this
    base: str = ""  # path of the model that a LoRA adapter was trained on, if it has moved
    quantize: Quantization = "none"  # int8: 8-bit weights; faster on a CPU, with a slightly higher loss

    def __post_init__(self):
        super().__post_init__()
        if self.emotion and self.emotion not in EMOTIONS:
            raise UserError(f"emotion={self.emotion} is unknown: use one of {', '.join(EMOTIONS)}")


def print_note(sentence: str):
    """Print a note to stderr, so that it does not mix with the answers."""
    sys.stdout.flush()
    print(sentence, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Remove control characters and direction marks, which could garble a terminal. Newlines and tabs are kept."""
    control_chars = {c for c in text if unicodedata.category(c) in ("Cc", "Cs") or c in BIDI_CONTROLS} - {"\n", "\t"}
    return "".join(c for c in text if c not in control_chars)


def is_interactive() -> bool:
    """Return True if stdin and stdout are both terminals."""
    return bool(sys.stdin and sys.stdin.isatty() and sys.stdout.isatty())


class Chat:
    """A chat that reads messages and prints answers, piece by piece on a terminal and otherwise one per line."""

    def __init__(self, conversation: Conversation, terminal: Terminal | None = None):
        self.conversation, self.is_interactive, self.terminal = conversation, is_interactive(), terminal
        commands = self.help, self.retry, self.undo, self.reset, self.system, self.temperature, self.save, self.load
        self.commands = {command.__name__: command for command in commands}

    def run(self) -> int:
        """Answer messages until the input ends or the user enters /quit, and return the exit code."""
        while (line := self.read_message()) is not None:
            raw_line, line = line.strip(), printable(line).strip()
            exit_code = 0
            if raw_line and not line:
                print_note("that line has no printable characters")
            elif line in ("/quit", "/exit"):
                return 0
            elif line.startswith("/"):
                command, _, argument = line[1:].partition(" ")
                exit_code = self.run_command(command, argument.strip())
            elif line:
                exit_code = self.answer(line)
            if exit_code:
                return exit_code
        return 0

    def read_message(self) -> str | None:
        """Return the next message, or None at the end of the input."""
        while True:
            try:
                if self.is_interactive:
                    return self.terminal.read("You: ") if self.terminal else input("You: ")
                return sys.stdin.readline() or None if sys.stdin else None  # stdin is None if it is closed
            except EOFError:
                print("" if self.terminal else "\n", end="", flush=True)
                return None
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                print_note("(Ctrl-D exits)" if self.terminal else "\n(Ctrl-D exits)")

    def answer(self, line: str, verbatim: bool = False) -> int:
        """Print the model's answer. Return an exit code if the program should exit, else 0.

        With verbatim=True, the answer keeps its newlines even if it is not printed on a terminal.
        """
        pieces, output, start = self.conversation.reply(line), [], time.perf_counter()
        is_streaming, has_label = self.is_interactive or verbatim, self.is_interactive and not verbatim
        needs_speaker_name = has_label
        with runtime.Interrupts() as interrupts:
            try:
                for piece in pieces:
                    output.append(printable(piece))
                    if is_streaming and output[-1]:
                        needs_speaker_name = needs_speaker_name and self.print_label()
                        print(output[-1], end="", flush=True)
                    if interrupts.exit_code:
                        break
            finally:
                pieces.close()
                needs_speaker_name = needs_speaker_name and self.print_label()  # for an empty answer
                # one line per answer for programs that read them
                print("" if is_streaming else " ".join("".join(output).split()), flush=True)
        self.print_statistics(time.perf_counter() - start, has_label)
        is_only_this_answer = self.is_interactive and interrupts.exit_code == 130  # Ctrl-C does not end the chat
        return 0 if is_only_this_answer else interrupts.exit_code

    def print_label(self) -> bool:
        """Print the model's name before its answer. Return False, so that the name is printed only once."""
        if self.terminal:
            self.terminal.write("Bot: ", "bold ansiblue")
        else:
            print("Bot: ", end="", flush=True)
        return False

    def print_statistics(self, seconds: float, with_speed: bool):
        """Print whether the answer was cut off and, on a terminal, how fast it was generated."""
        if not self.conversation.exchanges:
            return
        exchange = self.conversation.exchanges[-1]
        n, is_cut_off = exchange.num_new_tokens, exchange.end_reason == "length"
        note = f"cut off after {n:,} tokens (--max_new_tokens)" if is_cut_off else f"{n:,} tokens"
        note = f"[{note}, {n / seconds:,.0f} tokens/s]" if with_speed else f"[{note}]"
        if with_speed and self.terminal:
            self.terminal.write(f"{note}\n", "ansibrightblack")
        elif with_speed or is_cut_off:
            print_note(note)

    def run_command(self, name: str, argument: str) -> int:
        """Run the command /name and print its errors. Return an exit code if the program should exit, else 0."""
        if name not in self.commands:
            print_note(f"unknown command /{name}: /help lists the commands")
            return 0
        try:
            result = self.commands[name](argument)
        except UserError as error:
            result = f"/{name}: {error}"
        if isinstance(result, str):
            print_note(result)
            return 0
        return result

    # ------------------------------------------------------------------------------------------------------------------
    # commands: each returns a note, or the exit code of an answer

    def help(self, argument: str) -> str:
        return f"{HELP}\n{HELP_KEYS}" if self.terminal else HELP

    def retry(self, argument: str) -> int:
        if self.conversation.sampling.temperature == 0 and self.conversation.exchanges:
            remedy = "first set a higher temperature, as in /temperature 0.7"
            raise UserError(f"at temperature 0, the answer is always the same: {remedy}")
        return self.answer(self.conversation.undo())

    def undo(self, argument: str) -> str:
        return f"removed: {' '.join(self.conversation.undo().split())}"

    def reset(self, argument: str) -> str:
        self.conversation.reset()
        return "started a new conversation: the model no longer sees earlier messages"

    def system(self, text: str) -> str:
        self.conversation.set_system(text)
        return "the system message has been set" if text else "the system message has been removed"

    def temperature(self, text: str) -> str:
        if not text:
            return f"the temperature is {self.conversation.sampling.temperature:g}"
        try:
            self.conversation.sampling = replace(self.conversation.sampling, temperature=float(text))
        except DecodingError as error:
            raise UserError(str(error)) from None
        except ValueError:
            raise UserError(f"{text!r} is not a number: enter one, as in /temperature 0.5") from None
        return f"the temperature is now {self.conversation.sampling.temperature:g}"

    def save(self, path: str) -> str:
        messages = self.conversation.messages()
        if not path or not messages:
            raise UserError("add a file name, as in /save talk.jsonl" if messages else "nothing has been said yet")
        path = os.path.expanduser(path)
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder: enter the name of a file")
        if os.path.isfile(path):
            try:
                read_conversations(path)
            except UserError:
                raise UserError(f"{path} exists and is not a saved conversation: choose another name") from None
        lines = [json.dumps({"role": role, "content": content}, ensure_ascii=False) for role, content in messages]
        try:
            with locked_output(path), atomic_write(path, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{line}\n" for line in lines)
        except (OSError, UnicodeError) as error:  # UnicodeError: typed halves of surrogate pairs
            raise UserError(f"{path} could not be written ({error}): choose another name") from error
        return f"saved {len(messages):,} messages to {path}"

    def load(self, path: str) -> str:
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise UserError(f"{path!r} does not exist: enter the path of a file, as in /load talk.jsonl")
        conversations = read_conversations(path)
        if len(conversations) != 1:
            raise UserError(f"{path} contains {len(conversations):,} conversations: use a file with only one")
        self.conversation.restore(conversations[0])
        return f"loaded {len(conversations[0]):,} messages from {path}"


def read_conversations(path: str) -> list[list[tuple[str, str]]]:
    """Return a file's conversations as lists of (role, content). Raises UserError that names the line of a mistake."""
    conversations = Dialogues(Files([path])).read()
    return [[(role, content) for role, content, _ in conversation] for conversation in conversations]


def start_conversation(cfg: ChatConfig, path: str, is_default_temperature: bool) -> Conversation:
    """Start a conversation with the model at path, using the system message and topic from the settings."""
    # an explicit --template works even if the checkpoint's own template is unknown to this version
    uses_template = cfg.template == "auto"
    generator = ready.load(path, cfg.device, cfg.dtype, cfg.quantize, cfg.compile, uses_template, cfg.base)
    tokenizer = generator.require_tokenizer()
    template = (tokenizer.template or PLAIN_TEMPLATE) if cfg.template == "auto" else TEMPLATES[cfg.template]
    print_note(generator.description)
    if is_default_temperature and cfg.template == "auto" and tokenizer.template:
        cfg = replace(cfg, temperature=0.0)  # small models answer best with their most likely tokens
        print_note(
            "temperature: 0, so the same conversation always gets the same answers; use --temperature=0.7 to vary them"
        )
    settings = print_note, cfg.max_new_tokens, cfg.seed
    conversation = Conversation(generator.model, tokenizer, template, cfg, *settings)  # a ChatConfig is a Sampling
    if cfg.template == "auto" and not tokenizer.template:
        print_note(BASE_MODEL_NOTE)
    texts = cfg.system, choose_topic(cfg, template.name)
    for option, text, set_text in zip(("system", "context"), texts, (conversation.set_system, conversation.set_topic)):
        try:
            set_text(text)
        except UserError as error:
            raise UserError(f"--{option}: {error}") from None
    return conversation


def choose_topic(cfg: ChatConfig, template: str) -> str:
    """Return the emotion or context for an eds template, from the settings or, on a terminal, from the user."""
    for name in ("emotion", "context"):
        if getattr(cfg, name) and template != f"eds-{name}":
            raise UserError(f"--{name} works only with --template=eds-{name}: add that option, or remove --{name}")
    topic, question = printable(cfg.context), "What is the situation? (press Enter to skip) "
    if template == "eds-emotion":
        topic, question = cfg.emotion, f"Which emotion? {', '.join(EMOTIONS)} (press Enter to let the model guess) "
    if topic or cfg.prompt or template not in ("eds-emotion", "eds-context") or not is_interactive():
        return topic
    try:
        topic = printable(input(question)).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""
    if template == "eds-emotion" and topic and topic not in EMOTIONS:
        print_note(f"{topic} is not on the list, so the model will guess")
        return ""
    return topic


def main(argv: list[str] | None = None) -> int:
    cfg, given, paths = configurator.load_with_paths(ChatConfig, argv, "[CHECKPOINT]")
    if paths and cfg.out_dir:
        raise UserError(f"{paths[0]} and --out_dir={cfg.out_dir} both name a model: remove one of them")
    path = "".join(paths) or cfg.out_dir
    if not path:
        raise UserError("no model given: pass a run's folder, a checkpoint or gpt2, as in python chat.py out-chat-demo")
    prompts = [given[key] for key in given if key in ("prompt", "start")]  # two names for one setting; the last wins
    prompt = printable(read_prompt("".join(prompts[-1:]))).strip()
    if prompts and not prompt:
        raise UserError("--prompt is empty: enter a question, or remove --prompt to start a conversation")
    print_note(f"loading {path}")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    conversation = start_conversation(cfg, path, "temperature" not in given)
    if prompt:
        return Chat(conversation).answer(prompt, verbatim=True)
    terminal = open_terminal(HISTORY_PATH) if is_interactive() else None
    if is_interactive():
        if terminal is None:  # in a pipe, readline may write escape sequences to stdout
            with contextlib.suppress(ImportError):  # lets input() edit and recall lines; on Windows, the console does
                import readline  # noqa: F401
        print_note("/help lists the commands; Ctrl-D exits")
    return Chat(conversation, terminal).run()


if __name__ == "__main__":
    run_program(main)
