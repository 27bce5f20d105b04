"""llama.cpp's own HTTP server, from the wheel xllamacpp: run in an environment of its own, not in ours.

python llama_server.py MODEL.gguf PORT THREADS CLIENTS CONTEXT
"""

import sys
import time

import xllamacpp  # type: ignore[import-not-found]


def main() -> None:
    model, port, threads, clients, context = sys.argv[1], *map(int, sys.argv[2:6])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel = clients
    params.n_ctx = context * clients  # it is divided among the clients
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
