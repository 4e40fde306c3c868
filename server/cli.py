"""The command line: `python -m server …`. Everything that a person starts, and what they are told.

Knows commands and messages; what the programs do is in `server.serving` and `server.worker`.
"""

import errno
import getpass
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from migrations import MigrationError, Move, migrate, state
from server import __version__
from server.database import ESCAPES, Database, make_private, unescaped
from server.errors import NotFound, Unavailable
from server.ids import is_id
from server.keys import store as keys
from server.keys.store import ApiKey
from server.logs import audit, configure, log
from server.pages import LARGEST_PAGE, PageQuery
from server.programs import Programs
from server.serving import CannotServe, leave, listen, serve, stop_in_order, stop_with_parent
from server.settings import API_KEY, Settings

__all__ = ["main"]

SHORTEST_BODY = '{"environment": {"kind": "gymnasium", "id": "CartPole-v1"}}'

program = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""Train policies by policy gradient and ask them for actions, over HTTP.

    `python -m server serve` is all that a laptop needs: it makes a SQLite file, shows an API key once, and starts the
    API with a worker beside it. With many machines and PostgreSQL run `migrate` once, then `api` and `worker` as
    often as wanted. Settings are environment variables that begin with PGENGINE_; options override them, and
    docs/settings.md lists them.""",
)
key_program = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
program.add_typer(key_program, name="keys")

DataDir = Annotated[Path | None, typer.Option(help="Directory of the SQLite file; PGENGINE_DATA_DIR.")]
DatabaseUrl = Annotated[
    str | None, typer.Option(help="sqlite:///path or postgresql://user:password@host/name; PGENGINE_DATABASE_URL.")
]
Host = Annotated[str | None, typer.Option(help="Address to listen on; PGENGINE_HOST.")]
Port = Annotated[int | None, typer.Option(help="Port to listen on, 0 for a free one; PGENGINE_PORT.")]
Workers = Annotated[int | None, typer.Option(help="Workers beside the API; PGENGINE_WORKERS.")]
NoAuth = Annotated[
    bool | None, typer.Option("--no-auth", help="Ask nobody for a key; loopback only. PGENGINE_NO_AUTH.")
]


def main() -> None:
    """Run the command that the arguments name."""
    try:
        program(prog_name="python -m server")
    except SystemExit as end:
        leave(end.code)
        raise


@program.callback(invoke_without_command=True)
def version(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@program.command("serve")
def serve_(
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    host: Host = None,
    port: Port = None,
    workers: Workers = None,
    no_auth: NoAuth = None,
) -> None:
    """Start the API and its workers here.

    The first start makes the database and an API key, which is shown once.
    """
    settings = _settings(
        data_dir=data_dir, database_url=database_url, host=host, port=port, workers=workers, no_auth=no_auth
    )
    _check_modules(settings)
    configure(settings.log_level)
    stop_in_order()
    stop_with_parent()
    with _database(settings) as database, _serving(), listen(settings) as sock:
        if state(database).current is None:
            migrate(database)
        _check_revision(database)
        # a worker first gives its job back (one grace period), then ends its trainer (another one)
        grace_seconds = 2 * settings.grace_seconds + 2
        with Programs("worker", settings.workers, settings.environment(), grace_seconds):
            serve(settings, database, sock, lambda: _greet(settings, database, sock))


@program.command()
def demo(
    updates: Annotated[int | None, typer.Option(min=1, help="Stop training after so many updates.")] = None,
) -> None:
    """Train a policy over HTTP and ask it for actions.

    With a server of its own, of which nothing is left behind. The status is 1 if the target is missed.
    """
    # no other program needs a client and a progress bar
    from server.demo import run_demo

    raise typer.Exit(run_demo(updates=updates))


@program.command()
def api(
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    host: Host = None,
    port: Port = None,
    no_auth: NoAuth = None,
) -> None:
    """Start the API alone.

    The database must have been migrated.
    """
    settings = _settings(data_dir=data_dir, database_url=database_url, host=host, port=port, no_auth=no_auth)
    _check_modules(settings)
    configure(settings.log_level)
    stop_in_order()
    with _database(settings) as database, _serving(), listen(settings) as sock:
        _check_revision(database)
        serve(settings, database, sock, lambda: _greet(settings, database, sock))


@program.command()
def worker(data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Start one worker.

    It takes jobs from the database until it is told to stop, and then gives back the one at hand.
    """
    # the API needs no worker code and the worker no web framework
    from server.worker.supervisor import run_supervisor

    settings = _settings(data_dir=data_dir, database_url=database_url)
    _check_modules(settings)
    with _database(settings, pool_size=4) as database:
        _check_revision(database)
        run_supervisor(database, settings)


@program.command("migrate")
def migrate_(
    to: Annotated[str, typer.Option(help="head, base (removes everything) or a revision.")] = "head",
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Bring the database to this version.

    A SQLite file is copied before it is changed.
    """
    settings = _settings(data_dir=data_dir, database_url=database_url)
    with _database(settings) as database:
        _tell_move(migrate(database, to))


@key_program.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[list[str], typer.Option(help="read, act, train or admin (all); may be given several times.")],
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Make a key and show its secret, once."""
    if name == API_KEY:
        _fail(f"a key of this name is replaced by the variable {API_KEY}; choose another name", status=2)
    scopes = [known for known in keys.SCOPES if known in scope]
    if unknown := sorted(set(scope) - set(scopes)):
        _fail(f"{', '.join(unknown)} is no scope; there are {', '.join(keys.SCOPES)}", status=2)
    with _keys(data_dir, database_url) as database, database.write() as session:
        row, secret = keys.create(session, name, scopes)
    audit("key_created", key_id=row.id, name=row.name, scopes=row.scopes, by=_user())
    typer.echo(f"{row.id}  {','.join(row.scopes)}\n{secret}")


@key_program.command("list")
def list_keys(data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """List all keys, the oldest first; secrets are not kept anywhere."""
    with _keys(data_dir, database_url) as database:
        for row in _all_keys(database):
            state = "revoked" if row.revoked_at else "valid"
            used = f"used {row.last_used_at:%Y-%m-%d %H:%M}Z" if row.last_used_at else "never used"
            typer.echo(f"{row.id}  {state:7}  {','.join(row.scopes):18}  {used:22}  {row.name}")


@key_program.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The id that `keys list` shows.")],
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """End a key; running servers notice within five seconds."""
    if not is_id("key", key_id):
        _fail("the id of a key looks like key_ and 32 hexadecimal digits; `keys list` shows them", status=2)
    with _keys(data_dir, database_url) as database:
        try:
            with database.write() as session:
                keys.revoke(session, key_id)
        except NotFound as error:
            _fail(error.message)
    audit("key_revoked", key_id=key_id, by=_user())
    typer.echo(f"{key_id} is revoked")


# --- what is said at the start ----------------------------------------------------------------------------------------


def _greet(settings: Settings, database: Database, sock: socket.socket) -> None:
    """Say where everything is. Only now is a key made, so that none is shown by a program that cannot start."""
    host, port = sock.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key, secret = _admit(settings, database)
    lines = [f"API    {url}", f"docs   {url}/docs", f"key    {key}", f"data   {_where(database)}"]
    authorization = f" -H 'authorization: Bearer {secret}'" if secret else ""
    lines.append(
        f"try    curl -s {url}/v1/training-jobs{authorization} -H 'content-type: application/json' -d '{SHORTEST_BODY}'"
    )
    typer.echo("\n".join(lines))
    sys.stdout.flush()


def _where(database: Database) -> str:
    """Where the data is, for people: a file, or a database without its password."""
    if database.dialect == "sqlite":
        return os.path.abspath(database.url.database or "")
    # a socket's directory, and hosts of which there are several, stand behind the question mark
    where = {name: database.url.query[name] for name in ("host", "port") if name in database.url.query}
    return database.url.set(drivername="postgresql", query=where).render_as_string(hide_password=True)


def _admit(settings: Settings, database: Database) -> tuple[str, str | None]:
    """Make sure that somebody can use the API: what to say of the key, and what to write in an example."""
    if settings.no_auth:
        return "none is asked for (--no-auth)", None
    if settings.api_key is not None:
        with database.write() as session:
            replaced = keys.ensure(session, settings.api_key.get_secret_value(), API_KEY)
        for old in replaced:
            audit("key_revoked", key_id=old.id, by=API_KEY, reason="the variable names another key now")
        return f"the one in {API_KEY}", "<key>"
    with database.write() as session:
        if (old_key := keys.valid(session, API_KEY)) is not None:
            end = f"`python -m server keys revoke {old_key.id}` ends it"
            return f"the one that {API_KEY} named at an earlier start; {end}", "<key>"
        first = keys.create_first(session, "first start")
    if first is None:
        return "one of those in the database; `python -m server keys create NAME --scope admin` makes another", "<key>"
    row, secret = first
    audit("key_created", key_id=row.id, name=row.name, scopes=row.scopes, by="first start")
    return f"{secret}   (shown only now: keep it)", secret


# --- what can be wrong with what is asked for -------------------------------------------------------------------------


def _settings(**options: Any) -> Settings:
    """The settings, with the options that were given put over them."""
    try:
        return Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        for line in error.errors():
            if line["type"] == "default_factory_not_called":
                continue  # follows from another line
            name = f"PGENGINE_{str(line['loc'][0]).upper()}: " if line["loc"] else ""
            typer.echo(f"error: {name}{line['msg'].removeprefix('Value error, ')}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def _serving() -> Iterator[None]:
    """Why the API cannot start is said in one line."""
    try:
        yield
    except CannotServe as error:
        _fail(str(error), error.status)


@contextmanager
def _database(settings: Settings, pool_size: int = 20) -> Iterator[Database]:
    """The database, after it has answered; what is wrong with it is said in one line."""
    try:
        database = Database(settings.database_url, pool_size=pool_size, lease_seconds=settings.lease_seconds)
    except (ValueError, SQLAlchemyError) as error:
        _fail(f"PGENGINE_DATABASE_URL: {error}", status=2)
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is missing: pip install 'pgengine[server,postgres]'")
    if database.dialect == "sqlite":
        _make_writable(Path(database.url.database or "").absolute())
    try:
        database.ping()
        yield database
    except MigrationError as error:
        _fail(str(error))
    except Unavailable as error:
        where = database.url.render_as_string(hide_password=True)
        raw = " ".join(unescaped(settings.database_url))
        hint = f" (its password has {raw} in it: {ESCAPES})" if raw else ""
        what = "cannot be used" if database.dialect == "sqlite" else "does not answer"
        _fail(f"the database {where} {what}: {database.health.reason or error.message}{hint}")
    finally:
        database.dispose()


def _check_modules(settings: Settings) -> None:
    """Whether there are the modules that register environments; a trainer that lacks one could never start."""
    for name in settings.environment_modules:
        why = f"there is no module {name}"
        try:
            found = all(part.isidentifier() for part in name.split(".")) and find_spec(name) is not None
        # a package is imported to look into it, is the operator's code, and may fail in any way
        except Exception as error:  # noqa: BLE001
            found = False
            if not (isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")):
                why = f"the module {name} cannot be imported: {type(error).__name__}: {error}"
        if not found:
            _fail(f"PGENGINE_ENVIRONMENT_MODULES: {why}", status=2)


def _make_writable(file: Path) -> None:
    try:
        open_still = make_private(file)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
        if not os.access(file, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        _fail(f"cannot write to {file.parent}: {error.strerror}; choose another directory with PGENGINE_DATA_DIR")
    for path in open_still:
        log("readable_by_others", "warning", path=str(path), advice="it belongs to another user: chmod go= it")


def _check_revision(database: Database) -> None:
    found = state(database)
    if not found.matches:
        _fail(found.advice)


@contextmanager
def _keys(data_dir: Path | None, database_url: str | None) -> Iterator[Database]:
    settings = _settings(data_dir=data_dir, database_url=database_url)
    configure(settings.log_level)
    with _database(settings, pool_size=1) as database:
        _check_revision(database)
        yield database


def _user() -> str:
    """Who runs this program, as the machine knows them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _all_keys(database: Database) -> Iterator[ApiKey]:
    after = None
    while True:
        with database.read() as session:
            page = keys.list_(session, PageQuery(limit=LARGEST_PAGE, after=after, order="asc"))
        yield from page.rows
        if (after := page.next_cursor) is None:
            return


def _tell_move(move: Move) -> None:
    if move.before == move.after:
        typer.echo(f"the database is at revision {move.after or 'none'} already")
        return
    typer.echo(f"migrated from revision {move.before or 'none'} to {move.after or 'none'}")
    if move.backup is not None:
        typer.echo(f"the database as it was: {move.backup}")


def _fail(message: str, status: int = 1) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)
