"""A frame as one JSON document: the line that sinks write."""

from __future__ import annotations

import msgspec

from agent.serializers.document import DocumentSerializer


class JsonSerializer(DocumentSerializer):
    """Writes frames as JSON, without a line feed at the end; NaN becomes null."""

    has_nan = True
    encoder = msgspec.json.Encoder
