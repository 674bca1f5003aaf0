"""Files of a run, changed."""

import json


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
