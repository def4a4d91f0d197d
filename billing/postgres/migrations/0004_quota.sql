-- The provider's quota as an account of the shadow ledger: what it lets us consume, counted from our first call, is
-- leased to workers in slabs, so that no call touches a row or key that all calls share.

CREATE TABLE provider_quota (
    id              boolean PRIMARY KEY DEFAULT true CHECK (id), -- one row
    granted_nanousd bigint,      -- consumable in all, counted as `quota_slabs` counts; NULL: the provider names no limit
    left_nanousd    bigint,      -- as the provider said when it was last asked
    asked_at        timestamptz, -- by whichever worker's turn it was
    low             boolean NOT NULL DEFAULT false,
    paused_until    timestamptz, -- the provider refuses us: nothing is sent before
    pause_reason    text
);
INSERT INTO provider_quota DEFAULT VALUES;

-- leased: given to the worker since it began, spent: what its calls were settled at. What a worker may still use is
-- their difference; what is consumed of the quota for certain is the sum of what was spent. Worker 0 stands for all that
-- have ended, and for corrections.
CREATE TABLE quota_slabs (
    worker_id      uuid PRIMARY KEY,
    leased_nanousd bigint NOT NULL DEFAULT 0,
    spent_nanousd  bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
INSERT INTO quota_slabs (worker_id, leased_nanousd, spent_nanousd)
SELECT '00000000-0000-0000-0000-000000000000', coalesce(sum(amount_nanousd), 0), coalesce(sum(amount_nanousd), 0)
FROM shadow_usd_ledger WHERE kind <> 'opening';

-- A correction of what was consumed is nobody's slab.
CREATE FUNCTION spend_correction() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE quota_slabs SET leased_nanousd = leased_nanousd + NEW.amount_nanousd, spent_nanousd = spent_nanousd + NEW.amount_nanousd
    WHERE worker_id = '00000000-0000-0000-0000-000000000000';
    RETURN NULL;
END $$;
CREATE TRIGGER shadow_usd_ledger_correction AFTER INSERT ON shadow_usd_ledger
    FOR EACH ROW WHEN (NEW.kind = 'correction') EXECUTE FUNCTION spend_correction();

-- Lease at least p_need and about p_want more to a worker that has p_outstanding of earlier leases left, held by calls or
-- free; but no more than its share of what is free, so that the last of a quota does not lie idle with one of them. What
-- is outstanding is the worker's word, so that a lease whose answer was lost is not lost with it. Returns what was given,
-- 0 if less than p_need is free, NULL where there is no limit; and what is left free.
CREATE FUNCTION lease_quota(
    p_worker uuid, p_outstanding bigint, p_need bigint, p_want bigint, OUT given bigint, OUT free bigint
) LANGUAGE plpgsql AS $$
DECLARE
    granted bigint;
    sharing bigint;
BEGIN
    SELECT q.granted_nanousd INTO granted FROM provider_quota q FOR UPDATE; -- one lease at a time
    IF granted IS NULL THEN
        RETURN;
    END IF;
    INSERT INTO quota_slabs (worker_id) VALUES (p_worker) ON CONFLICT (worker_id) DO NOTHING;
    UPDATE quota_slabs s SET leased_nanousd = s.spent_nanousd + p_outstanding WHERE s.worker_id = p_worker;
    SELECT granted - coalesce(sum(greatest(s.leased_nanousd, s.spent_nanousd)), 0) INTO free FROM quota_slabs s;
    SELECT greatest(count(*), 1) INTO sharing FROM workers w WHERE w.stopped_at IS NULL AND w.lease_until > now();
    given := greatest(p_need, least(p_want, free / (2 * sharing)));
    IF given > free THEN
        given := 0;
        RETURN;
    END IF;
    UPDATE quota_slabs s SET leased_nanousd = s.leased_nanousd + given WHERE s.worker_id = p_worker;
    free := free - given;
END $$;

-- Give back what ended workers had leased and not spent: those that signed off, or whose lease ended long enough ago, and
-- that have no call to be settled any more. Returns how many.
CREATE FUNCTION return_slabs(p_grace interval) RETURNS bigint LANGUAGE sql AS $$
    WITH ended AS (
        DELETE FROM quota_slabs s USING workers w
        WHERE w.id = s.worker_id AND (w.stopped_at IS NOT NULL OR w.lease_until < now() - p_grace)
          AND NOT EXISTS (SELECT 1 FROM calls c WHERE c.state IN ('open', 'review') AND c.worker_id = w.id)
        RETURNING s.spent_nanousd
    ), kept AS (
        UPDATE quota_slabs s SET leased_nanousd = s.leased_nanousd + e.spent, spent_nanousd = s.spent_nanousd + e.spent
        FROM (SELECT sum(ended.spent_nanousd) AS spent, count(*) AS many FROM ended) e
        WHERE s.worker_id = '00000000-0000-0000-0000-000000000000' AND e.many > 0
    )
    SELECT count(*) FROM ended
$$;

-- What each of the provider's own totals was before our first call: the zero from which I8 counts.
CREATE TABLE provider_openings (
    source        text PRIMARY KEY CHECK (source IN ('credits', 'key')),
    total_nanousd bigint NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now()
);
INSERT INTO provider_openings (source, total_nanousd)
SELECT 'credits', amount_nanousd FROM shadow_usd_ledger WHERE kind = 'opening';

-- What one process among all does now and then, and when it last did: a turn is claimed by moving the time.
CREATE TABLE routine_turns (
    name     text PRIMARY KEY,
    taken_at timestamptz NOT NULL
);
CREATE FUNCTION take_turn(p_name text, p_period interval) RETURNS boolean LANGUAGE sql AS $$
    WITH taken AS (
        INSERT INTO routine_turns (name, taken_at) VALUES (p_name, now())
        ON CONFLICT (name) DO UPDATE SET taken_at = now() WHERE routine_turns.taken_at <= now() - p_period
        RETURNING 1
    )
    SELECT EXISTS (SELECT 1 FROM taken)
$$;

ALTER TABLE reconciliation_diffs ADD COLUMN note text NOT NULL DEFAULT '';

-- The moment that a UUIDv7 was minted, to the millisecond.
CREATE FUNCTION uuid_moment(id uuid) RETURNS timestamptz LANGUAGE sql IMMUTABLE AS $$
    SELECT to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 1000.0)
$$;

-- What reconciliation asks the provider about.
CREATE INDEX calls_doubtful ON calls (id)
    WHERE (state = 'settled' AND (accuracy = 'estimated' OR provider_cost_nanousd IS NULL)) OR state = 'void';
