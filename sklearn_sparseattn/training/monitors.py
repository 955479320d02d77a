"""Which callbacks of skorch need validation rows."""

from collections.abc import Sequence

from skorch.callbacks import BatchScoring, Callback, EpochScoring, LRScheduler, PassthroughScoring
from torch.optim.lr_scheduler import ReduceLROnPlateau

_SCORING = (BatchScoring, EpochScoring, PassthroughScoring)


def refuse_without_validation(callbacks: Sequence[tuple[str, Callback]]) -> None:
    """Refuse callbacks that need validation rows.

    Parameters
    ----------
    callbacks : sequence of (name, Callback)
        The user's, of a fit without validation rows.

    Raises
    ------
    ValueError
        If one of them scores validation rows, or monitors what is recorded of them.
    """
    scores = [callback for _, callback in callbacks if isinstance(callback, _SCORING)]
    of_training = {str(score.name or score.scoring) for score in scores if score.on_train}
    for name, callback in callbacks:
        monitor = _monitored(callback)
        if isinstance(callback, _SCORING) and not callback.on_train:
            need, way = "scores validation rows", ", or on_train=True to the callback"
        elif monitor.startswith("valid_") and monitor.removesuffix("_best") not in of_training:
            need, way = f"monitors {monitor!r}", ", or the callback a monitor of training, as 'train_loss'"
        else:
            continue
        raise ValueError(
            f"callbacks: {type(callback).__name__} ({name!r}) {need}, and this fit has no validation rows. "
            "Give fit X_val and y_val, or early_stopping=True or lr_schedule='plateau', which hold out "
            f"validation_fraction of X{way}. partial_fit never has validation rows."
        )


def _monitored(callback: Callback) -> str:
    """The column that a callback looks at; "" if there is none, or a function that decides."""
    if isinstance(callback, LRScheduler) and callback.policy not in ("ReduceLROnPlateau", ReduceLROnPlateau):
        return ""  # others do not look at theirs
    monitor = getattr(callback, "monitor", None)
    return monitor if isinstance(monitor, str) else ""
