"""One HTML file that shows what a fitted classifier answers and where it looked. Imports only `files`.

Jinja2 and matplotlib, the extra `report`, are imported when a report is written. The estimator is reached by
its public attributes.
"""

from .write import write_report

__all__ = ["write_report"]
