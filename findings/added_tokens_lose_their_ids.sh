#!/usr/bin/env bash
# Packages: tokenizers 0.22.1, Python 3.9 or later.
#
# A tokenizer.json gives every added token an id of its own, so one would expect a token to get the
# id that the file says, wherever that lies: weights were trained with it. Vocabularies with holes
# are ordinary (tokens that were cut out, ids reserved for later, a table padded to a round size).
#
# What happens: an added token that the model's vocabulary does not hold gets the number of entries
# there are so far as its id. The file's own "id" is passed over, without an error or a warning, and
# with a hole in the vocabulary the new id can be one that a word has already: two tokens then share
# a row of the embedding.
#
# Seen: "<act>", id 9 in the file, is encoded as 4 beside four words with the ids 0, 1, 2 and 4; the
# word "blue" is 4 as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.22.1
cat > "$folder/show.py" <<'EOF'
import json
import sys

import tokenizers

words = {"lift": 0, "the": 1, "red": 2, "blue": 4}
added = {"id": 9, "content": "<act>", "special": True, "single_word": False}
added.update(lstrip=False, rstrip=False, normalized=False)
content = {
    "version": "1.0",
    "added_tokens": [added],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": words, "unk_token": "the"},
}
with open(sys.argv[1], "w") as file:
    json.dump(content, file)
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
found = tokenizer.encode("lift the blue <act>").ids
print(f"tokenizers {tokenizers.__version__}: {found}, the file says [0, 1, 4, 9]")
raise SystemExit(0 if found == [0, 1, 4, 4] else "the behavior has changed")
EOF
"$folder/venv/bin/python" "$folder/show.py" "$folder/tokenizer.json"
