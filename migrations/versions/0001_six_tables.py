"""six tables

Rules of a migration here:
- It runs on PostgreSQL and on SQLite, up and down, and `alembic check` is clean after it on both.
- The code before it keeps working beside it (expand first, contract a release later): a column comes
  nullable or with a server default, and nothing is renamed in one step.
- It takes no lock that a running gateway waits for longer than a second: indexes on request_logs are
  created concurrently on PostgreSQL.

Revision ID: 0001
Revises: 
"""

import sqlalchemy as sa
from alembic import op

revision = '0001'
down_revision = None
branch_labels = None
depends_on = None

COUNTS = ("requests", "errors", "refused", "client_closed", "unpriced_requests",
          "prompt_tokens", "completion_tokens", "cached_tokens", "total_tokens", "cost_nano")
BUCKETS = [f"{name}_{i:02}" for name in ("latency", "ttft") for i in range(32)]


def upgrade():
    op.create_table('request_logs',
    sa.Column('id', sa.String(length=40), nullable=False),
    sa.Column('workspace_id', sa.String(length=40), nullable=False),
    sa.Column('api_key_id', sa.String(length=40), nullable=False),
    sa.Column('api_key_name', sa.String(length=100), nullable=False),
    sa.Column('owner', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('orphaned_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('status', sa.String(length=13), nullable=False),
    sa.Column('swept', sa.Boolean(), nullable=False),
    sa.Column('count', sa.Integer(), nullable=False),
    sa.Column('endpoint', sa.String(length=20), nullable=False),
    sa.Column('stream', sa.Boolean(), nullable=False),
    sa.Column('http_status', sa.SmallInteger(), nullable=True),
    sa.Column('model', sa.String(length=200), nullable=False),
    sa.Column('served_model', sa.String(length=200), nullable=True),
    sa.Column('provider', sa.String(length=40), nullable=True),
    sa.Column('provider_key_id', sa.String(length=40), nullable=True),
    sa.Column('end_user', sa.String(length=100), nullable=True),
    sa.Column('prompt_tokens', sa.BigInteger(), nullable=True),
    sa.Column('completion_tokens', sa.BigInteger(), nullable=True),
    sa.Column('total_tokens', sa.BigInteger(), nullable=True),
    sa.Column('cached_tokens', sa.BigInteger(), nullable=True),
    sa.Column('cache_write_tokens', sa.BigInteger(), nullable=True),
    sa.Column('reasoning_tokens', sa.BigInteger(), nullable=True),
    sa.Column('usage_source', sa.String(length=8), nullable=True),
    sa.Column('latency_us', sa.BigInteger(), nullable=True),
    sa.Column('ttft_us', sa.BigInteger(), nullable=True),
    sa.Column('overhead_us', sa.BigInteger(), nullable=True),
    sa.Column('error_type', sa.String(length=100), nullable=True),
    sa.Column('error_code', sa.String(length=100), nullable=True),
    sa.Column('error_message', sa.Text(), nullable=True),
    sa.Column('attempts', sa.Text(), nullable=True),
    sa.Column('price', sa.Text(), nullable=True),
    sa.Column('hold_nano', sa.BigInteger(), nullable=True),
    sa.Column('key_period', sa.DateTime(timezone=True), nullable=True),
    sa.Column('workspace_period', sa.DateTime(timezone=True), nullable=True),
    sa.Column('token_advance_us', sa.BigInteger(), nullable=True),
    sa.Column('checks', sa.Text(), nullable=True),
    sa.Column('cost_nano', sa.BigInteger(), nullable=True),
    sa.Column('preview_prompt', sa.String(length=200), nullable=True),
    sa.Column('preview_answer', sa.String(length=200), nullable=True),
    sa.Column('request_body', sa.LargeBinary(), nullable=True),
    sa.Column('response_body', sa.LargeBinary(), nullable=True),
    sa.CheckConstraint("status in ('open', 'ok', 'error', 'refused', 'client_closed', 'interrupted')", name=op.f('ck_request_logs_status')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_request_logs'))
    )
    with op.batch_alter_table('request_logs', schema=None) as batch_op:
        batch_op.create_index('ix_request_logs_open', ['workspace_id', 'created_at', 'id'], unique=False, postgresql_where=sa.text("status = 'open'"), sqlite_where=sa.text("status = 'open'"))
        batch_op.create_index('ix_request_logs_workspace_id_created_at_id', ['workspace_id', 'created_at', 'id'], unique=False)

    op.create_table('usage_counters',
    sa.Column('workspace_id', sa.String(length=40), nullable=False),
    sa.Column('hour', sa.DateTime(timezone=True), nullable=False),
    sa.Column('api_key_id', sa.String(length=40), nullable=False),
    sa.Column('provider', sa.String(length=40), nullable=False),
    sa.Column('model', sa.String(length=200), nullable=False),
    *(sa.Column(name, sa.BigInteger(), nullable=False) for name in COUNTS),
    *(sa.Column(name, sa.Integer(), nullable=False) for name in BUCKETS),
    sa.PrimaryKeyConstraint('workspace_id', 'hour', 'api_key_id', 'provider', 'model', name=op.f('pk_usage_counters'))
    )
    op.create_table('users',
    sa.Column('id', sa.String(length=40), nullable=False),
    sa.Column('email', sa.String(length=254), nullable=False),
    sa.Column('name', sa.String(length=200), nullable=True),
    sa.Column('password_hash', sa.String(length=200), nullable=False),
    sa.Column('epoch', sa.Integer(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_users')),
    sa.UniqueConstraint('email', name=op.f('uq_users_email'))
    )
    op.create_table('workspaces',
    sa.Column('id', sa.String(length=40), nullable=False),
    sa.Column('user_id', sa.String(length=40), nullable=False),
    sa.Column('name', sa.String(length=200), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('log_bodies', sa.Boolean(), nullable=False),
    sa.Column('retention_days', sa.Integer(), nullable=True),
    sa.Column('pruned_before', sa.DateTime(timezone=True), nullable=True),
    sa.Column('routes', sa.Text(), nullable=False),
    sa.Column('config_version', sa.BigInteger(), nullable=False),
    sa.Column('monthly_budget_nano', sa.BigInteger(), nullable=True),
    sa.Column('spent_nano', sa.BigInteger(), nullable=False),
    sa.Column('held_nano', sa.BigInteger(), nullable=False),
    sa.Column('period_start', sa.DateTime(timezone=True), nullable=True),
    sa.ForeignKeyConstraint(['user_id'], ['users.id'], name=op.f('fk_workspaces_user_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_workspaces'))
    )
    with op.batch_alter_table('workspaces', schema=None) as batch_op:
        batch_op.create_index('ix_workspaces_user_id_created_at', ['user_id', 'created_at', 'id'], unique=False)

    op.create_table('api_keys',
    sa.Column('id', sa.String(length=40), nullable=False),
    sa.Column('workspace_id', sa.String(length=40), nullable=False),
    sa.Column('name', sa.String(length=100), nullable=False),
    sa.Column('prefix', sa.String(length=16), nullable=False),
    sa.Column('hash', sa.String(length=64), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('revoked_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('last_used_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('models', sa.Text(), nullable=True),
    sa.Column('rpm_limit', sa.Integer(), nullable=True),
    sa.Column('tpm_limit', sa.Integer(), nullable=True),
    sa.Column('budget_nano', sa.BigInteger(), nullable=True),
    sa.Column('budget_period', sa.String(length=5), nullable=False),
    sa.Column('spent_nano', sa.BigInteger(), nullable=False),
    sa.Column('held_nano', sa.BigInteger(), nullable=False),
    sa.Column('period_start', sa.DateTime(timezone=True), nullable=True),
    sa.Column('rpm_full_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('tpm_full_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("budget_period in ('day', 'week', 'month', 'total')", name=op.f('ck_api_keys_budget_period')),
    sa.ForeignKeyConstraint(['workspace_id'], ['workspaces.id'], name=op.f('fk_api_keys_workspace_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_api_keys')),
    sa.UniqueConstraint('hash', name=op.f('uq_api_keys_hash'))
    )
    with op.batch_alter_table('api_keys', schema=None) as batch_op:
        batch_op.create_index('ix_api_keys_workspace_id_created_at', ['workspace_id', 'created_at', 'id'], unique=False)

    op.create_table('provider_keys',
    sa.Column('id', sa.String(length=40), nullable=False),
    sa.Column('workspace_id', sa.String(length=40), nullable=False),
    sa.Column('provider', sa.String(length=40), nullable=False),
    sa.Column('name', sa.String(length=100), nullable=True),
    sa.Column('base_url', sa.String(length=2000), nullable=True),
    sa.Column('resolved_base_url', sa.String(length=2000), nullable=False),
    sa.Column('sealed', sa.Text(), nullable=False),
    sa.Column('hint', sa.String(length=4), nullable=False),
    sa.Column('models', sa.Text(), nullable=True),
    sa.Column('priority', sa.Integer(), nullable=False),
    sa.Column('weight', sa.Integer(), nullable=False),
    sa.Column('prices', sa.Text(), nullable=True),
    sa.Column('enabled', sa.Boolean(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('last_used_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('last_error', sa.String(length=1000), nullable=True),
    sa.ForeignKeyConstraint(['workspace_id'], ['workspaces.id'], name=op.f('fk_provider_keys_workspace_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_provider_keys'))
    )
    with op.batch_alter_table('provider_keys', schema=None) as batch_op:
        batch_op.create_index('ix_provider_keys_workspace_id_created_at', ['workspace_id', 'created_at', 'id'], unique=False)


    if op.get_bind().dialect.name == "postgresql":
        # A counter row is rewritten with each commit: room in its page keeps those updates off the index.
        op.execute("alter table usage_counters set (fillfactor = 50)")


def downgrade():
    with op.batch_alter_table('provider_keys', schema=None) as batch_op:
        batch_op.drop_index('ix_provider_keys_workspace_id_created_at')

    op.drop_table('provider_keys')
    with op.batch_alter_table('api_keys', schema=None) as batch_op:
        batch_op.drop_index('ix_api_keys_workspace_id_created_at')

    op.drop_table('api_keys')
    with op.batch_alter_table('workspaces', schema=None) as batch_op:
        batch_op.drop_index('ix_workspaces_user_id_created_at')

    op.drop_table('workspaces')
    op.drop_table('users')
    op.drop_table('usage_counters')
    with op.batch_alter_table('request_logs', schema=None) as batch_op:
        batch_op.drop_index('ix_request_logs_workspace_id_created_at_id')
        batch_op.drop_index('ix_request_logs_open', postgresql_where=sa.text("status = 'open'"), sqlite_where=sa.text("status = 'open'"))

    op.drop_table('request_logs')
