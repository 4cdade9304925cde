"""What llama.cpp itself makes of texts, by xllamacpp of PyPI. Prints JSON: the embeddings of the texts of a JSON list by the model
that is named first, or with `tokens` their token ids."""

import json
import sys
import urllib.request

import xllamacpp

kind, path, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx = params.n_batch = params.n_ubatch = 64
params.cpuparams.n_threads = 1
params.n_parallel = 1
params.warmup = False
if kind == "embeddings":
    params.embedding = True
server = xllamacpp.Server(params)
if kind == "embeddings":
    answer = server.handle_embeddings({"input": texts})
    answer = json.loads(answer) if isinstance(answer, str) else answer
    print(json.dumps([item["embedding"] for item in answer["data"]]))
else:
    found = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as response:
            found.append(json.load(response)["tokens"])
    print(json.dumps(found))
