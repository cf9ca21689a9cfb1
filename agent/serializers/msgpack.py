"""A frame as one MessagePack map, of the shape of a JSON line."""

from __future__ import annotations

import msgspec

from agent.serializers.document import DocumentSerializer


class MsgpackSerializer(DocumentSerializer):
    """Writes frames as MessagePack, NaN as nil; a payload says itself where it ends."""

    has_nan = False
    encoder = msgspec.msgpack.Encoder
