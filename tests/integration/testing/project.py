"""A project with tests of its own, which pytest runs in another process."""

from __future__ import annotations

from string import Template

SHOP = """
    import asyncio
    import os
    import threading
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from asgi_uow import Database, UnitOfWorkMiddleware, after_commit

    INSERT = "INSERT INTO items (id) VALUES (:id)"
    SELECT = "SELECT id FROM items ORDER BY id"

    db = Database.from_url(os.environ["SHOP_URL"])
    mailed = []
    hangs = threading.Event()

    async def insert(number, then=None, receive=None):
        await db.write.execute(INSERT, id=number)
        after_commit(mailed.append, number)
        if then == "raise":
            raise ZeroDivisionError
        if then == "cancel":
            asyncio.current_task().cancel()
            await asyncio.sleep(0)
        if then == "hang":
            hangs.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            raise ConnectionError
        return 409 if then == "conflict" else 201

    async def select():
        return list(await db.read.scalars(SELECT))

    async def items(request):
        if request.method == "GET":
            return JSONResponse(await select())
        query = request.query_params
        status = await insert(int(query["id"]), query.get("then"), request.receive)
        return JSONResponse(None, status)

    app = Starlette(
        routes=[Route("/items", items, methods=["GET", "POST"])],
        middleware=[Middleware(UnitOfWorkMiddleware, db)],
    )
"""

CONFTEST = """
    import pytest
    pytest.register_assert_rewrite("story")
    from shop import db, hangs, mailed

    @pytest.fixture(scope="session")
    def uow_database():
        return db

    @pytest.fixture(autouse=True)
    def fresh():
        hangs.clear()
        mailed.clear()
"""

STORY = """
    import asyncio
    import httpx
    import pytest
    from asgi_uow.testing import assert_no_connection_held, fail_commit
    from shop import app, db, hangs, mailed

    def post(client, number, then=""):
        return client.post(f"/items?id={number}&then={then}")

    def client(**options):
        transport = httpx.ASGITransport(app, **options)
        return httpx.AsyncClient(transport=transport, base_url="http://shop")

    async def of_async_client(seed):
        '''What is kept is seen in this test, whatever happens in between.'''
        async with client(raise_app_exceptions=False) as shop:
            assert seed == (await shop.get("/items")).json()
            assert 201 == (await post(shop, 1)).status_code
            assert 409 == (await post(shop, 2, "conflict")).status_code
            assert 500 == (await post(shop, 3, "raise")).status_code
            async with fail_commit(db):
                assert 500 == (await post(shop, 4)).status_code

            task = asyncio.ensure_future(post(shop, 5, "hang"))
            assert await asyncio.to_thread(hangs.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

            with pytest.raises(ZeroDivisionError):
                await post(client(), 3, "raise")
            assert 201 == (await post(shop, 6)).status_code
            assert [*seed, 1, 6] == (await shop.get("/items")).json()
        assert [1, 6] == mailed
        assert_no_connection_held(db)

    def of_client(shop):
        '''The same, in a test that is synchronous.'''
        assert [] == shop.get("/items").json()
        assert 201 == post(shop, 1).status_code
        assert 409 == post(shop, 2, "conflict").status_code
        assert 500 == post(shop, 3, "raise").status_code
        with fail_commit(db):
            assert 500 == post(shop, 4).status_code
        assert 201 == post(shop, 6).status_code
        assert [1, 6] == shop.get("/items").json()
        assert [1, 6] == mailed
"""

_ANYIO = """
    import pytest
    from shop import db, insert, mailed
    from story import client, of_async_client, post

    pytestmark = pytest.mark.anyio

    @pytest.fixture$scope
    def anyio_backend():
        return "asyncio"

    @pytest.fixture
    async def seed(uow_sandbox):
        async with db:
            await insert(-1)
        mailed.clear()
        return [-1]

    @pytest.mark.parametrize("again", range(2))
    async def test_story(uow_sandbox, again):
        await of_async_client([])

    async def test_fixture(seed):
        await of_async_client(seed)

    def test_fixtures_without_a_sandbox(uow_hooks, uow_statements):
        assert ([], []) == (uow_hooks, uow_statements)

    async def test_hooks_and_statements(uow_hooks, uow_statements, uow_sandbox):
        async with client() as shop:
            await post(shop, 1)
        assert [(1,)] == [hook.args for hook in uow_hooks.of("after_commit")]
        assert [] == mailed
        assert 1 == len(uow_statements)
"""

_ASYNCIO = """
    import pytest
    import pytest_asyncio
    from shop import db, insert, mailed
    from story import client, of_async_client, post

    $fixture
    async def seed(uow_sandbox):
        async with db:
            await insert(-1)
        mailed.clear()
        return [-1]

    $mark
    @pytest.mark.parametrize("again", range(2))
    async def test_story(uow_sandbox, again):
        await of_async_client([])

    $mark
    async def test_fixture(seed):
        await of_async_client(seed)

    @pytest.mark.asyncio(loop_scope="module")
    @pytest.mark.parametrize("again", range(2))
    async def test_loop_of_module(uow_sandbox, again):
        await of_async_client([])

    $mark
    async def test_hooks_and_statements(uow_hooks, uow_statements, uow_sandbox):
        async with client() as shop:
            await post(shop, 1)
        assert [(1,)] == [hook.args for hook in uow_hooks.of("after_commit")]
        assert [] == mailed
        assert 1 == len(uow_statements)
"""

FUNCTION, MODULE = (
    Template(_ANYIO).substitute(scope=scope) for scope in ("", '(scope="module")')
)
STRICT, AUTO = (
    Template(_ASYNCIO).substitute(fixture=fixture, mark=mark)
    for fixture, mark in (
        ("@pytest_asyncio.fixture", "@pytest.mark.asyncio"),
        ("@pytest.fixture", ""),
    )
)

SYNC = """
    import pytest
    from asgi_uow.testing import SandboxMiddleware
    from starlette.testclient import TestClient
    from starlette.websockets import WebSocketDisconnect
    from shop import app, mailed
    from story import of_client, post

    def of_test_client(shop):
        of_client(shop)
        with pytest.raises(ZeroDivisionError):
            post(TestClient(app), 3, "raise")
        assert 500 == post(shop, 5, "cancel").status_code
        assert 201 == post(shop, 7).status_code
        assert [1, 6, 7] == shop.get("/items").json()

    @pytest.mark.parametrize("again", range(2))
    def test_without_a_block(uow_sandbox, again):
        of_test_client(TestClient(app, raise_server_exceptions=False))

    @pytest.mark.parametrize("again", range(2))
    def test_in_its_block(uow_sandbox, again):
        with TestClient(app, raise_server_exceptions=False) as shop:
            of_test_client(shop)

    def test_hooks_and_statements(uow_sandbox, uow_hooks, uow_statements):
        post(TestClient(app), 1)
        assert [(1,)] == [hook.args for hook in uow_hooks.of("after_commit")]
        assert [] == mailed
        assert 1 == len(uow_statements)

    def test_websocket_of_no_sandbox():
        shop = TestClient(SandboxMiddleware(app))
        with pytest.raises(WebSocketDisconnect) as raised:
            with shop.websocket_connect("/", headers={"x-asgi-uow-sandbox": "what"}):
                pass
        assert 1008 == raised.value.code
"""

SANIC = """
    import pytest
    from sanic import Sanic
    from sanic.response import json
    from starlette.testclient import TestClient
    import asgi_uow.sanic
    from asgi_uow import UnitOfWorkMiddleware
    from shop import db, insert, select
    from story import of_client

    def make(name):
        app = Sanic(name)

        @app.get("/items")
        async def get(request):
            return json(await select())

        @app.post("/items")
        async def add(request):
            then = request.args.get("then")
            return json(None, await insert(int(request.args.get("id")), then))

        return app

    native = make("native")
    asgi_uow.sanic.setup(native, db)
    asgi = UnitOfWorkMiddleware(make("asgi"), db)

    class Shop:
        def get(self, path):
            return Answer(native.test_client.get(path)[1])

        def post(self, path):
            return Answer(native.test_client.post(path)[1])

    class Answer:
        def __init__(self, response):
            self.status_code, self.json = response.status_code, lambda: response.json

    @pytest.mark.parametrize("again", range(2))
    def test_server(uow_sandbox, again):
        of_client(Shop())

    def test_asgi(uow_sandbox):
        with TestClient(asgi, raise_server_exceptions=False) as shop:
            of_client(shop)
"""

LIVE = """
    import asyncio
    import socket
    import threading
    import httpx
    import pytest
    import uvicorn
    from asgi_uow.testing import SandboxMiddleware, sandbox
    from shop import app, db, hangs
    from story import of_client, post

    @pytest.fixture(scope="module")
    def url():
        listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(SandboxMiddleware(app), lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield "http://127.0.0.1:{}".format(listening.getsockname()[1])
        server.should_exit = True
        thread.join()

    def leave(url, headers):
        '''Send a request, and go away before there is a response.'''
        port = int(url.rpartition(":")[2])
        lines = ["POST /items?id=5&then=hang HTTP/1.1", "host: shop"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall("\\r\\n".join([*lines, "", ""]).encode())
            assert hangs.wait(60)

    @pytest.mark.parametrize("named", [True, False])
    def test_story(uow_sandbox, url, named):
        headers = {"connection": "close"}  # uvicorn does so after an exception
        headers.update(uow_sandbox.headers if named else {})
        with httpx.Client(base_url=url, headers=headers) as shop:
            of_client(shop)
            leave(url, headers)
            assert 201 == post(shop, 7).status_code
            assert [1, 6, 7] == shop.get("/items").json()

    def test_unknown(url):
        with sandbox(db) as ended:
            pass
        for headers in (ended.headers, {"X-Asgi-Uow-Sandbox": "what"}):
            with httpx.Client(base_url=url, headers=headers) as shop:
                response = post(shop, 1)
                assert 409 == response.status_code
                assert "not open" in response.text
                assert 409 == shop.get("/items").status_code

    @pytest.mark.skipif(db.facts.SINGLE_WRITER, reason="one sandbox at a time")
    @pytest.mark.anyio
    async def test_two_at_once(url, anyio_backend):
        barrier = asyncio.Barrier(2)

        async def browse(first):
            async with sandbox(db) as box:
                headers = box.headers
                async with httpx.AsyncClient(base_url=url, headers=headers) as shop:
                    mine = [first, first + 1]
                    for number in mine:
                        await barrier.wait()
                        assert 201 == (await post(shop, number)).status_code
                    await barrier.wait()
                    assert mine == (await shop.get("/items")).json()
                    await barrier.wait()

        await asyncio.gather(browse(10), browse(20))
        async with httpx.AsyncClient(base_url=url) as shop:
            assert [] == (await shop.get("/items")).json()

    @pytest.fixture
    def anyio_backend():
        return "asyncio"
"""

HELD = """
    import os
    import signal
    from starlette.testclient import TestClient
    from shop import app
    from story import post

    def test_held(uow_sandbox):
        shop = TestClient(app)
        assert 201 == post(shop, 1).status_code
        assert [1] == shop.get("/items").json()
        os.write(int(os.environ["SHOP_PIPE"]), b"!")
        signal.pause()
"""
