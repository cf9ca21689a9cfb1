"""Whether the agent of this container is healthy: GET /healthz of its sink `prometheus`, by nothing but a socket.

    python -I -S healthcheck.py [PORT]

Prints the answer's text, which says what is wrong. Status 0: healthy; 1: not, or nobody answers.
"""

import socket
import sys

TIMEOUT_SECONDS = 4
ANSWER_BYTES_MAX = 16384


def main() -> int:
    """Asks once; the exit status."""
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9101
    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_SECONDS) as peer:
            peer.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            while len(answer) < ANSWER_BYTES_MAX and (part := peer.recv(ANSWER_BYTES_MAX)):
                answer += part
    except OSError as error:
        print(f"127.0.0.1:{port}: {error.strerror or error}")
        return 1
    head, _, text = answer.partition(b"\r\n\r\n")
    print(text.decode(errors="replace").rstrip())
    return 0 if head.split(b" ")[1:2] == [b"200"] else 1


if __name__ == "__main__":
    sys.exit(main())
