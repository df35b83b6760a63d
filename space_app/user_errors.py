"""How the command line reports mistakes: one paragraph on stderr and exit code 2, never a traceback."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import typer


INPUT_ERROR, PROGRAM_ERROR = 2, 1


@dataclass
class ErrorReporter:
    """Collects what went wrong, so that the remaining inputs are still processed.

    Attributes:
        debug: let every exception through.
        messages: (subject, message) of every error so far.
        exit_code: 0, 2 after wrong input, 1 after an error of the program itself.
    """

    debug: bool = False
    messages: list[tuple[str, str]] = field(default_factory=list)
    exit_code: int = 0

    @contextmanager
    def guard(self, subject: str, fatal: bool = False) -> Generator[None, None, None]:
        """Report exceptions of the block; a `fatal` one ends the command."""
        try:
            yield
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if self.debug:
                raise
            # Imported here because it pulls in torch, which has been loaded by whatever raised it.
            from processing_chex.errors import ChexInputError

            if isinstance(error, ChexInputError):
                self.exit_code, message = INPUT_ERROR, str(error)
            else:
                self.exit_code = self.exit_code or PROGRAM_ERROR
                message = f"{subject}: unexpected {type(error).__name__}: {error}. Add --debug to see where."
            message = " ".join(message.split())
            self.messages.append((subject, message))
            typer.echo(f"Error: {message}", err=True)
            if fatal:
                raise typer.Exit(self.exit_code) from None
