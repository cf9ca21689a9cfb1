"""The settings of one section of a foreign configuration: whoever takes one says of what kind, the rest is told."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from agent.importing.toml_text import comment_text
from agent.units import Duration

SECRETS_FOLDER = "/etc/hostprobe"
_VARIABLE = re.compile(r"\$\{([^}]*)\}|\$([A-Za-z_]\w*)|@\{([^}]*)\}")
_ONE_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}|\$([A-Za-z_]\w*)")
_GO_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h|d)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_WHOLE_MAX = 2**63

Tree = dict[str, Any]


def each(names: str, why: str) -> dict[str, str]:
    """The same reason for each of the names, which blanks part."""
    return dict.fromkeys(names.split(), why)


class Options:
    """A section's settings by name, whatever the case of its letters.

    Args:
        place: how messages name the section.
        has_variables: whether a text may hold `$NAME`, which another agent takes from its environment.

    Attributes:
        faults: settings whose value can't be taken, and why, in order.
    """

    def __init__(self, place: str, values: Mapping[str, Any], has_variables: bool = False) -> None:
        self.place = place
        self.faults: list[tuple[str, str]] = []
        self._values = {key.lower(): (key, value) for key, value in values.items()}
        self._has_variables = has_variables

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def value(self, key: str) -> Any:
        """The value as it is, None without one; it counts as taken."""
        return self._values.pop(key, (key, None))[1]

    def text(self, key: str, default: str = "") -> str:
        """A text, or a number as one."""
        value = self.value(key)
        if isinstance(value, list) and value:
            value = value[-1]  # collectd's last word holds
        found = default if value is None else self._as_text(key, value)
        return default if found is None else found

    def texts(self, key: str) -> list[str]:
        """All texts of a list; a single one is a list of one."""
        value = self.value(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        found = (self._as_text(key, item) for item in items)
        return [text for text in found if text is not None]

    def flag(self, key: str, default: bool) -> bool:
        """A boolean, also in quotes."""
        value = self.value(key)
        if isinstance(value, list) and value:
            value = value[-1]
        if value is None:
            return default
        if isinstance(value, str) and value.lower() in ("true", "yes", "on", "false", "no", "off"):
            return value.lower() in ("true", "yes", "on")
        if not isinstance(value, bool):
            self._fault(key, "expected true or false")
            return default
        return value

    def duration(self, key: str, unit_seconds: float = 1) -> str:
        """A duration as hostprobe writes it, "" without one: Go's "1m30s", or a number of the unit."""
        value = self.value(key)
        if isinstance(value, list) and value:
            value = value[-1]
        if value is None:
            return ""
        seconds = math.nan
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _WHOLE_MAX:
            seconds = value * unit_seconds
        elif isinstance(value, str):
            seconds = _go_seconds(value.strip(), unit_seconds)
        if not 0 <= seconds < _WHOLE_MAX / 1e9:
            self._fault(key, 'expected a duration such as "10s"')
            return ""
        return str(Duration(seconds))

    def table(self, key: str) -> Options | None:
        """A table inside of this one, None without it."""
        value = self.value(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None:
            return None
        if not isinstance(value, dict):
            self._fault(key, "expected a table")
            return None
        return Options(f"{self.place}.{key}", value, self._has_variables)

    def put(self, key: str, value: Any) -> None:
        """Adds a setting that stands elsewhere."""
        self._values[key] = (key, value)

    def put_back(self, key: str, table: Options) -> None:
        """What is left of a table that was taken, for somebody else or for the list of what nobody took."""
        self.faults += [(f"{key}.{name}", why) for name, why in table.faults]
        if table._values:
            self._values[key] = (key, dict(table._values.values()))

    def secret(self, key: str, env: bool = True) -> Tree | None:
        """The place of a secret instead of the secret itself, None without one.

        Args:
            env: whether a variable of the environment can be that place.
        """
        value = self.value(key)
        if value in (None, "", []):
            return None
        if env and self._has_variables and isinstance(value, str) and (match := _ONE_VARIABLE.fullmatch(value)):
            return {"env": match[1] or match[2]}
        slug = re.sub("[^a-z0-9]+", "-", f"{self.place.rpartition('.')[2]} {key}".lower()).strip("-")
        return {"file": f"{SECRETS_FOLDER}/{slug}"}

    def drop(self, *keys: str) -> None:
        """Settings that need no mention."""
        for key in keys:
            self._values.pop(key, None)

    def rest(self) -> list[str]:
        """The names of settings that nobody has taken; those that say nothing (false, 0, "") are left out."""
        return [name for name, value in self._values.values() if not _says_nothing(value)]

    def _as_text(self, key: str, value: Any) -> str | None:
        if isinstance(value, float) and value.is_integer() and abs(value) < _WHOLE_MAX:
            value = int(value)
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int | float) and abs(value) < _WHOLE_MAX:
            return str(value)
        if not isinstance(value, str):
            self._fault(key, "expected a text")
            return None
        if self._has_variables and (match := _VARIABLE.search(value)):
            name = comment_text(match[0]) if len(match[0]) <= 60 else "a variable"
            self._fault(key, f"its value comes from elsewhere, {name}")
            return None
        return value

    def _fault(self, key: str, why: str) -> None:
        if (key, why) not in self.faults:
            self.faults.append((key, why))


def _go_seconds(text: str, unit_seconds: float) -> float:
    """Seconds of Go's notation, NaN for anything else."""
    if len(text) > 64:
        return math.nan
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text) * unit_seconds
    if not re.fullmatch(f"({_GO_PART.pattern})+", text):
        return math.nan
    return sum(float(number) * _SECONDS[unit] for number, unit in _GO_PART.findall(text))


def _says_nothing(value: Any) -> bool:
    return value in (None, "", "0s", "0", False, 0) or value == [] or value == {}
