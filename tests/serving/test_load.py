"""A load test: 20 clients at the same time, in bounded memory."""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
from server import NAME, TEXT, running

CLIENTS, ROUNDS = 20, 3
# What the threads of 20 clients and of the server allocate once, such as arenas of the C library
# and buffers of connections. It does not grow with the number of requests.
ALLOWED = 64 * 2**20


def test_twenty_clients_in_bounded_memory(tiny):
    """Clients upload, ask about their own document and a common one, and delete theirs. The same
    load again and again allocates no more memory. Every answer is that of a client alone."""
    with running(*tiny, Path("memories"), max_waiting=CLIENTS, cache_size=2**20) as server:
        common = server.upload()["id"]
        clients = [
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=20)
            for _ in range(CLIENTS)
        ]

        def ask(number: int) -> str:
            own = server.upload(f"{number}: {TEXT}", f"{number}.txt")["id"]
            options = dict(model=NAME, prompt=f"{number}?", max_tokens=20, temperature=0)
            memory = {"memory": [common, own], "attention": bool(number % 2)}
            chunks = clients[number].completions.create(**options, stream=True, extra_body=memory)
            text = "".join(chunk.choices[0].text for chunk in chunks)
            assert server.http.delete(f"/v1/memories/{own}").status_code == 200
            return text

        alone = [ask(number) for number in range(CLIENTS)]
        process, sizes = psutil.Process(), []
        for _ in range(ROUNDS):
            with ThreadPoolExecutor(CLIENTS) as threads:
                assert list(threads.map(ask, range(CLIENTS))) == alone
            server.idle()
            gc.collect()
            sizes.append(process.memory_info().rss)
            states = server.service.states
            assert states.num_bytes <= states.size and len(states._loaded) <= CLIENTS
        assert len(set(alone)) > 1
        assert sizes[-1] - sizes[0] < ALLOWED, sizes
        assert [path.stem for path in Path("memories").glob("*.mem")] == [common]
