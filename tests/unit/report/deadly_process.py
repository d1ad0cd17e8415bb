"""Stands for the process that decodes: dies of the sample `deadly`, and is held up for ever by `endless`."""

import base64
import json
import os
import sys
import time

for wanted in json.load(sys.stdin)["wanted"]:
    if wanted["key"] == "deadly":
        os.abort()
    if wanted["key"] == "endless":
        time.sleep(600)
    picture = base64.b64encode(b"\xff\xd8\xff" + wanted["key"].encode()).decode()
    print(json.dumps({"pictures": [picture], "note": ""}), flush=True)
