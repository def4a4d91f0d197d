-- The provider's quota as an account of the shadow ledger: what it lets us consume, counted from our first call, is
-- leased to workers in slabs, so that no call touches a row or key that all calls share.

-- A correction of what was consumed is nobody's slab.
CREATE OR REPLACE FUNCTION spend_correction() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE quota_slabs SET leased_nanousd = leased_nanousd + NEW.amount_nanousd, spent_nanousd = spent_nanousd + NEW.amount_nanousd
    WHERE worker_id = '00000000-0000-0000-0000-000000000000';
    RETURN NULL;
END $$;

-- Lease at least p_need and about p_want more to a worker that has p_outstanding of earlier leases left, held by calls or
-- free; but no more than its share of what is free, so that the last of a quota does not lie idle with one of them. What
-- is outstanding is the worker's word, so that a lease whose answer was lost is not lost with it. Returns what was given,
-- 0 if less than p_need is free, NULL where there is no limit; and what is left free.
CREATE OR REPLACE FUNCTION lease_quota(
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

-- A worker gives back what it leased and does not need: `p_kept` is held by its calls, or soon will be.
CREATE OR REPLACE FUNCTION return_slab(p_worker uuid, p_kept bigint) RETURNS void LANGUAGE sql AS $$
    UPDATE quota_slabs SET leased_nanousd = spent_nanousd + p_kept WHERE worker_id = p_worker
$$;

-- Give back what ended workers had leased and not spent: those that signed off, or whose lease ended long enough ago, and
-- that have no call to be settled any more. Returns how many.
CREATE OR REPLACE FUNCTION return_slabs(p_grace interval) RETURNS bigint LANGUAGE sql AS $$
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

-- Whether the provider names a limit, and for how long nothing is sent to it, and why.
CREATE OR REPLACE FUNCTION read_pause() RETURNS TABLE (unlimited boolean, pause_reason text, left_s double precision) LANGUAGE sql STABLE AS $$
    SELECT q.granted_nanousd IS NULL, q.pause_reason, extract(epoch FROM q.paused_until - now())::double precision FROM provider_quota q
$$;

-- Send nothing to the provider for a while; every worker is told.
CREATE OR REPLACE FUNCTION pause_provider(p_pause interval, p_reason text) RETURNS void LANGUAGE sql AS $$
    UPDATE provider_quota SET paused_until = now() + p_pause, pause_reason = p_reason;
    SELECT pg_notify('tuma', 'quota:')
$$;

-- Calls are refused with words about our account, and nobody is served in between: operators are told, nobody is stopped.
CREATE OR REPLACE FUNCTION note_refusals(p_reason text) RETURNS void LANGUAGE sql AS $$
    UPDATE provider_quota SET refused_at = now(), refused_reason = p_reason
$$;
