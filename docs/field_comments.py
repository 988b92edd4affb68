"""For the API page: the comment beside a field of a class describes it."""

from __future__ import annotations

from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Add the fields' comments as "Attributes" to the docstring of a class."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Called by griffe for every class that it has read."""
        fields = []
        for name, field in cls.attributes.items():
            line = (
                cls.lines_collection[cls.filepath][field.endlineno - 1]
                if field.endlineno
                else ""
            )
            _, mark, comment = line.partition("  # ")
            if mark and field.annotation is not None:
                fields.append(f"    {name}: {comment}")
        if (
            fields
            and cls.docstring is not None
            and "Attributes:" not in cls.docstring.value
        ):
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(fields)
