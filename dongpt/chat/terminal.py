"""Read input from a terminal, with line editing, history and multiple lines, and print text in color.

    terminal = open_terminal("~/.dongpt_history")        # None if prompt_toolkit cannot be used
    text = terminal.read("You: ")                        # raises EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C
    terminal.write("Bot: ", "bold")

Requires prompt_toolkit.
"""

import contextlib
import os
import sys
from typing import Any


def open_terminal(history_path: str) -> "Terminal | None":
    """Return a Terminal that saves its history in the file history_path, or None if this is not possible.

    A Terminal requires prompt_toolkit and a console that can move the cursor (not TERM=dumb).
    """
    try:
        from prompt_toolkit.utils import is_dumb_terminal

        return None if is_dumb_terminal() or not os.isatty(sys.stdin.fileno()) else Terminal(history_path)
    except Exception:  # prompt_toolkit is missing, stdin has no file descriptor, or the console is not supported
        return None


class Terminal:
    """A prompt_toolkit session. Enter sends the text; Alt-Enter, or a backslash before Enter, starts a new line."""

    def __init__(self, history_path: str):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.output import ColorDepth, create_output

        keys, self.color_depth, self.output = KeyBindings(), ColorDepth.from_env(), create_output(sys.stdout)
        if hasattr(self.output, "enable_cpr"):  # cursor position requests would delay every line
            self.output.enable_cpr = False

        @keys.add("enter")
        def send_or_continue(event):
            buffer = event.current_buffer
            if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        history = make_history(os.path.expanduser(history_path))
        options: dict[str, Any] = dict(history=history, key_bindings=keys, color_depth=self.color_depth)
        self.session: Any = PromptSession(multiline=True, output=self.output, reserve_space_for_menu=0, **options)

    def read(self, label: str) -> str:
        """Prompt the user with label and return the text, which may have multiple lines."""
        return self.session.prompt([("bold ansigreen", label)], prompt_continuation=" " * len(label))

    def write(self, text: str, style: str):
        """Print text in a prompt_toolkit style such as "bold ansiblue", without a newline at the end."""
        from prompt_toolkit import print_formatted_text
        from prompt_toolkit.formatted_text import FormattedText

        sys.stdout.flush()
        fragments = FormattedText([(style, text)])
        print_formatted_text(fragments, end="", output=self.output, color_depth=self.color_depth)


def make_history(path: str):
    """Return a history stored in a file that only the user can read. File system errors are ignored."""
    from prompt_toolkit.history import FileHistory

    class History(FileHistory):
        def load_history_strings(self):
            with contextlib.suppress(OSError):
                yield from super().load_history_strings()

        def store_string(self, string: str):
            with contextlib.suppress(OSError, UnicodeError):  # UnicodeError: typed bytes that are not UTF-8
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
                super().store_string(string)

    return History(path)
