"""What ends a command: one line on stderr and exit code 2."""

from __future__ import annotations

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # as a shell has it after Ctrl-C
EXIT_UNREAD = 141  # as a shell has it where the reader of a pipe has left


class CommandError(Exception):
    """A command cannot do what it was asked for; the message says what is wrong and how to mend it."""
