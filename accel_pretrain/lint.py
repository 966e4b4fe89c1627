"""Everything that is legal and probably not meant, each with what to type: one list, for the plan and for ``train``.

What cannot be run at all is refused elsewhere, in :func:`accel_pretrain.config.make_plan` and in the config's own classes.
"""

from __future__ import annotations

from accel_pretrain import lint_run, lint_settings
from accel_pretrain.config import Plan, RunConfig, Splits
from accel_pretrain.hardware import here
from accel_pretrain.lint_settings import Finding
from accel_pretrain.outlook import Outlook, look_ahead


def findings(outlook: Outlook) -> list[Finding]:
    """All of them, the serious ones first."""
    found = [finding for rule in (*lint_settings.RULES, *lint_run.RULES) for finding in rule(outlook)]
    return sorted(found, key=lambda finding: not finding.serious)


def notices(config: RunConfig, plan: Plan, splits: Splits, *, cpu: bool) -> list[str]:
    """For the first lines of a run: what is serious, and how much else there is."""
    found = findings(look_ahead(config, splits, machine=here(cpu), plan=plan))
    serious = [str(finding) for finding in found if finding.serious]
    rest = len(found) - len(serious)
    more = f"{rest} more remark{'s' if rest > 1 else ''}; type python -m accel_pretrain.plan with the same settings"
    return [*serious, *([more] if rest else [])]
