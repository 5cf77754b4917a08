#!/bin/bash
# Copy train.lmdb and val.lmdb to the node's own disk, and compare each copy with what was read. Files that are already
# there are kept. Two jobs on a node do not disturb each other.
#
#     bash cluster/copy_to_node.sh /shared/imagenet /local/imagenet
set -euo pipefail
usage="usage: bash cluster/copy_to_node.sh FROM TO"
from=${1:?$usage}
to=${2:?$usage}
mkdir -p "$to"
exec 9>"$to/.copy.lock"
flock 9

for name in train.lmdb val.lmdb; do
    [ -r "$from/$name" ] || { echo "error: $from/$name cannot be read on $(hostname)" >&2; exit 1; }
    bytes=$(stat -L -c %s "$from/$name")
    if [ -e "$to/$name" ] && [ "$(stat -c %s "$to/$name")" = "$bytes" ] && [ ! "$from/$name" -nt "$to/$name" ]; then
        continue
    fi
    rm -f "$to/$name" "$to/.$name".*
    free=$(df --output=avail -B1 "$to" | tail -n 1)
    [ "$free" -gt "$bytes" ] || { echo "error: $to on $(hostname) has $free of $bytes bytes for $name" >&2; exit 1; }
    copy="$to/.$name.$$"
    sent=$(tee "$copy" <"$from/$name" | sha256sum)
    # Read the copy from the disk, not from the memory in which the system still has it.
    dd of="$copy" oflag=nocache conv=notrunc,fdatasync count=0 status=none
    [ "$(sha256sum <"$copy")" = "$sent" ] || { rm "$copy"; echo "error: $to on $(hostname) keeps wrong data" >&2; exit 1; }
    mv "$copy" "$to/$name"
    echo "copied $name to $to on $(hostname): $bytes bytes"
done
