"""${message}

Rules of a migration here:
- It runs on PostgreSQL and on SQLite, up and down, and `alembic check` is clean after it on both.
- The code before it keeps working beside it (expand first, contract a release later): a column comes
  nullable or with a server default, and nothing is renamed in one step.
- It takes no lock that a running gateway waits for longer than a second: indexes on request_logs are
  created concurrently on PostgreSQL.

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade():
    ${upgrades if upgrades else "pass"}


def downgrade():
    ${downgrades if downgrades else "pass"}
