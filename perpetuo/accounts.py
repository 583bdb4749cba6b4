"""Users: making them, checking passwords, ending sessions. For the views and the commands; knows no Flask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from perpetuo import crypto
from perpetuo.db import Database
from perpetuo.errors import Forbidden, GatewayError, NotFound
from perpetuo.models import User, Workspace
from perpetuo.schemas import Signup, is_storable, parse

# Fits no password, and takes as long to find that out: so an unknown e-mail answers like a known one.
NOBODY = f"{crypto.ARGON2_PREFIX}AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"

T = TypeVar("T")


def reading(database: Database, work: Callable[[Session], T]) -> T:
    """`work(session)` on the read pool; the records stay readable, no connection stays out."""

    def with_session(connection: sa.Connection) -> T:
        with Session(bind=connection, expire_on_commit=False, autoflush=False) as session:
            return work(session)

    return database.read(with_session)


def create_user(
    database: Database, email: str, password: str, name: str | None = None, signup: str = "open"
) -> tuple[User, Workspace]:
    """A user with a first workspace.

    Raises InvalidRequest, Forbidden `signup_closed` (with `signup` "first" once there is a user) and 409
    `email_taken`.
    """
    check_signup(database, signup)
    wanted = parse(Signup, {"email": email, "password": password, "name": name})
    hashed = database.native.slow(crypto.hash_password, wanted.password)

    def insert(session: Session) -> tuple[User, Workspace]:
        if signup == "first":
            _alone(session, database)
        user = User(email=wanted.email, name=wanted.name, password_hash=hashed)
        session.add(user)
        session.flush()
        workspace = Workspace(user_id=user.id, name="Default")
        session.add(workspace)
        session.flush()
        session.refresh(user)
        session.refresh(workspace)
        return user, workspace

    try:
        return database.save(insert)
    except IntegrityError as exc:
        raise GatewayError(
            "This e-mail address has an account already.",
            status=409,
            type="invalid_request_error",
            code="email_taken",
            param="email",
        ) from exc


def check_signup(database: Database, signup: str) -> None:
    """Refuses early what `create_user` would refuse after its work. Raises Forbidden."""
    if signup == "closed" or (signup == "first" and database.read(_has_users)):
        raise _closed()


def _alone(session: Session, database: Database) -> None:
    """Two first sign-ups wait here for each other; on SQLite they did so at BEGIN."""
    if not database.is_sqlite:
        session.execute(sa.text("lock table users in share row exclusive mode"))
    if _has_users(session.connection()):
        raise _closed()


def _has_users(connection: sa.Connection) -> bool:
    return connection.execute(sa.select(User.id).limit(1)).first() is not None


def _closed() -> Forbidden:
    return Forbidden("Sign-up is closed here: ask the operator for an account.", code="signup_closed")


def is_password(database: Database, user: User | None, password: str) -> bool:
    """Whether it is this user's password; for nobody as slowly as for somebody."""
    hashed = user.password_hash if user else NOBODY
    if not database.native.slow(crypto.is_password, password, hashed) or user is None:
        return False
    if crypto.is_weak(user.password_hash):
        _rehash(database, user, password)
    return True


def _rehash(database: Database, user: User, password: str) -> None:
    """Stores the password under today's parameters, unless it was changed meanwhile."""
    hashed = database.native.slow(crypto.hash_password, password)
    query = sa.update(User).where(User.id == user.id, User.password_hash == user.password_hash)
    database.transaction(lambda connection: connection.execute(query.values(password_hash=hashed)))


def find_user(database: Database, email: str) -> User | None:
    query = sa.select(User).where(User.email == email.strip().lower())
    return reading(database, lambda session: session.scalar(query))


def load_user(database: Database, id: str, epoch: int) -> User | None:
    """The user of a session or token, None once it was ended."""
    user = reading(database, lambda session: session.get(User, id))
    return user if user is not None and user.epoch == epoch else None


def change_user(database: Database, user_id: str, **changes: str | None) -> User:
    """Sets a user's `name`, or `password`, which ends every session and token. Raises NotFound."""
    password = changes.pop("password", None)
    hashed = database.native.slow(crypto.hash_password, password) if password else None

    def change(session: Session) -> User:
        user = _locked(session, user_id)
        if "name" in changes:
            user.name = changes["name"]
        if hashed:
            user.password_hash = hashed
            user.epoch += 1
        return user

    return database.save(change)


def reset_password(database: Database, email: str, password: str) -> User:
    """The operator's way in for somebody who forgot. Raises InvalidRequest and NotFound."""
    wanted = parse(Signup, {"email": email, "password": password})
    user = find_user(database, wanted.email)
    if user is None:
        raise NotFound("There is no such user.")
    return change_user(database, user.id, password=wanted.password)


def sign_out(database: Database, user_id: str) -> None:
    """Ends every session and token of the user."""

    def end(session: Session) -> None:
        _locked(session, user_id).epoch += 1

    database.save(end)


def _locked(session: Session, user_id: str) -> User:
    user = session.get(User, user_id, with_for_update={"key_share": True})
    if user is None:
        raise NotFound("There is no such user.")
    return user


def workspaces_of(database: Database, user: User) -> list[Workspace]:
    query = sa.select(Workspace).where(Workspace.user_id == user.id)
    query = query.order_by(Workspace.created_at.desc(), Workspace.id.desc())
    return list(reading(database, lambda session: session.scalars(query).all()))


def get_workspace(database: Database, user: User, workspace_id: str) -> Workspace:
    """The user's own workspace. Another's and a missing one give the same NotFound."""
    query = sa.select(Workspace).where(Workspace.user_id == user.id, Workspace.id == workspace_id)
    workspace = None
    if is_storable(workspace_id):
        workspace = reading(database, lambda session: session.scalar(query))
    if workspace is None:
        raise NotFound("There is no such workspace.")
    return workspace


def lock_workspace(session: Session, workspace_id: str) -> Workspace:
    """The workspace, locked to be changed; what gateways keep of it in memory is out of date from here on.

    Whoever locks API keys too does so before. Raises NotFound where it was deleted meanwhile.
    """
    workspace = session.get(Workspace, workspace_id, with_for_update={"key_share": True})
    if workspace is None:
        raise NotFound("There is no such workspace.")
    workspace.config_version += 1
    return workspace
