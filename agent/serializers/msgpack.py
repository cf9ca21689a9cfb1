"""A frame as one MessagePack map, of the shape of a JSON line."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from agent.frame import Frame
from agent.pool import Buffer
from agent.serializers.document import Document, Identity, in_unicode
from agent.table import TableSpec


class MsgpackSerializer:
    """Writes frames as MessagePack into a reused buffer; a payload says itself where it ends.

    Args:
        specs: the tables that may come.
        identity: the host, the run and the tags of the header.
        rates: whether derived columns are written.
    """

    def __init__(self, specs: Iterable[TableSpec], identity: Identity, rates: bool = True) -> None:
        self._document = Document(specs, identity, rates, has_nan=False)
        self._encoder = msgspec.msgpack.Encoder()

    def write(self, frame: Frame, buffer: Buffer, tables: Collection[str] = (), left_out: Collection[str] = ()) -> None:
        """Makes `buffer.data` the frame's map; parameters as JsonSerializer.write has them."""
        document = self._document.of(frame, tables, left_out)
        buffer.make_room(self._document.need_bytes)
        try:
            self._encoder.encode_into(document, buffer.data)
        except UnicodeEncodeError:
            self._encoder.encode_into(in_unicode(document), buffer.data)
