"""A frame as one JSON document: the line that sinks write."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from agent.frame import Frame
from agent.pool import Buffer
from agent.serializers.document import Document, Identity, in_unicode
from agent.table import TableSpec


class JsonSerializer:
    """Writes frames as JSON into a reused buffer, without a line feed at the end; NaN becomes null.

    Args:
        specs: the tables that may come.
        identity: the host, the run and the tags of the header.
        rates: whether derived columns are written.
    """

    def __init__(self, specs: Iterable[TableSpec], identity: Identity, rates: bool = True) -> None:
        self._document = Document(specs, identity, rates, has_nan=True)
        self._encoder = msgspec.json.Encoder()

    def write(self, frame: Frame, buffer: Buffer, tables: Collection[str] = (), left_out: Collection[str] = ()) -> None:
        """Makes `buffer.data` the frame's JSON; it is sized beforehand and does not regrow meanwhile.

        Args:
            tables: the names of those that are written; all without any.
            left_out: the names of those that are left out and named in the header, as `degraded`.
        """
        document = self._document.of(frame, tables, left_out)
        buffer.make_room(self._document.need_bytes)
        try:
            self._encoder.encode_into(document, buffer.data)
        except UnicodeEncodeError:  # a label with bytes that are no UTF-8
            self._encoder.encode_into(in_unicode(document), buffer.data)
