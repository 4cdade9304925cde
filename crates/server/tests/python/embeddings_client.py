"""Embeddings by the client `openai` of PyPI, unchanged, from the server at argv[1]."""

import base64
import json
import struct
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="any", max_retries=0)
TEXTS = ["One, two, three.", "The quick brown fox."]

# The client asks for base64 and decodes it.
decoded = client.embeddings.create(model="embedder", input=TEXTS)
plain = client.embeddings.create(model="embedder", input=TEXTS, encoding_format="float")
raw = client.embeddings.create(model="embedder", input=TEXTS, encoding_format="base64")
assert [item.index for item in plain.data] == [0, 1] and plain.object == "list", plain
for a, b, c in zip(decoded.data, plain.data, raw.data):
    values = list(struct.unpack(f"<{len(b.embedding)}f", base64.b64decode(c.embedding)))
    exact = struct.unpack(f"<{len(b.embedding)}f", struct.pack(f"<{len(b.embedding)}f", *b.embedding))
    assert list(exact) == values and max(abs(x - y) for x, y in zip(a.embedding, values)) < 1e-6, (a, b)
    assert abs(sum(x * x for x in values) - 1) < 1e-4, values
assert plain.usage.prompt_tokens == plain.usage.total_tokens > 4, plain.usage

one = client.embeddings.create(model="embedder", input=TEXTS[0])
assert max(abs(x - y) for x, y in zip(one.data[0].embedding, decoded.data[0].embedding)) < 1e-5, one
ids = client.embeddings.create(model="embedder", input=[[5, 6, 7], [8]])
flat = client.embeddings.create(model="embedder", input=[5, 6, 7])
assert len(ids.data) == 2 and flat.data[0].embedding == ids.data[0].embedding and ids.usage.prompt_tokens == 4, ids
short = client.embeddings.create(model="embedder", input="a", dimensions=8)
assert len(short.data[0].embedding) == 8, short

refused = {}
for name, arguments in {
    "empty": {"input": ""},
    "mixed": {"input": ["a", 1]},
    "unknown token": {"input": [[100000]]},
    "too long": {"input": [list(range(5, 400))]},
    "dimensions": {"input": "a", "dimensions": 1000},
    "no embedder": {"input": "a", "model": "echo"},
}.items():
    try:
        client.embeddings.create(**({"model": "embedder"} | arguments))
    except openai.BadRequestError as error:
        refused[name] = [error.status_code, error.body["param"], error.body["code"]]
print(json.dumps({"dimensions": len(plain.data[0].embedding), "vector": plain.data[0].embedding, "refused": refused}))
