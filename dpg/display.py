"""What a person sees while a run goes on: one live line in a terminal, plain lines anywhere else."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dpg.records import Record


class Display:
    """A progress bar with Φ, the figures, the reward's spread and the speed; a context manager."""

    def __init__(self, num_steps: int) -> None:
        self._console = Console()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=num_steps, figures="")
        self._tokens = 0
        self._seconds = 0.0

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, record: Record) -> None:
        """Bring the line up to date; print validations so that they stay."""
        self._tokens += record.num_tokens
        self._seconds += record.seconds
        figures = [] if record.phi is None else [f"Φ {record.phi:.6f}"]
        figures += [f"{_words(name)} {value:.3f}" for name, value in record.measures.items()]
        if record.step > 0:
            figures += [f"reward spread {record.reward_std:.1e}", f"{self._tokens / self._seconds:.0f} tokens/s"]
        self._progress.update(self._task, completed=record.step, figures="  ".join(figures))
        if record.validation is not None:
            validated = "  ".join(f"{_words(name)} {value:.3f}" for name, value in record.validation.items())
            self._progress.console.print(f"step {record.step:>4}  fresh texts: {validated}", highlight=False)


def _words(name: str) -> str:
    return name.replace("_", " ").replace("phi", "Φ")
