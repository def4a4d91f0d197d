-- The processes that make calls, and the leases that say that they live.

-- A process that makes calls begins, lives on, and ends.
CREATE OR REPLACE FUNCTION register_worker(p_id uuid, p_host text, p_pid integer, p_lease interval) RETURNS void LANGUAGE sql AS $$
    INSERT INTO workers (id, host, pid, lease_until) VALUES (p_id, p_host, p_pid, now() + p_lease)
$$;

CREATE OR REPLACE FUNCTION renew_worker(p_id uuid, p_lease interval) RETURNS void LANGUAGE sql AS $$
    UPDATE workers SET lease_until = now() + p_lease WHERE id = p_id
$$;

CREATE OR REPLACE FUNCTION sign_off_worker(p_id uuid) RETURNS void LANGUAGE sql AS $$
    UPDATE workers SET stopped_at = now() WHERE id = p_id
$$;

-- Which of these calls have been ended, by whomever. One in review is still to be ended.
CREATE OR REPLACE FUNCTION find_ended(p_ids uuid[]) RETURNS SETOF uuid LANGUAGE sql STABLE AS $$
    SELECT c.id FROM calls c WHERE c.id = ANY (p_ids) AND c.state IN ('settled', 'void')
$$;
