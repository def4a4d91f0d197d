-- What was used, summed as calls end (docs/decisions/0013-usage-rollups.md).
--
-- Whoever changes what a call cost holds its wallet's row locked and changes the sums in the same transaction: they equal the
-- rows at every moment.

-- When the quarter of an hour begins in which an id was minted.
CREATE OR REPLACE FUNCTION usage_quarter(id uuid) RETURNS timestamptz LANGUAGE sql IMMUTABLE AS $$
    SELECT to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 900000 * 900)
$$;

-- The bin of a duration: 0 is faster than 100 ms, 1 than 200, …, 11 than nothing.
CREATE OR REPLACE FUNCTION usage_bin(ms integer) RETURNS integer LANGUAGE sql IMMUTABLE AS $$
    SELECT width_bucket(ms, ARRAY[100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 51200, 102400])
$$;

CREATE OR REPLACE FUNCTION add_bins(a integer[], b integer[]) RETURNS integer[] LANGUAGE sql IMMUTABLE AS $$
    SELECT ARRAY[a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6],
                 a[7] + b[7], a[8] + b[8], a[9] + b[9], a[10] + b[10], a[11] + b[11], a[12] + b[12]]
$$;

-- Add what these calls count as they stand now, or take it away (p_sign -1).
CREATE OR REPLACE FUNCTION add_usage(p_ids uuid[], p_sign integer) RETURNS void LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off AS $$
DECLARE
    low  uuid;
    high uuid;
BEGIN
    SELECT r.low, r.high INTO low, high FROM id_range(p_ids) r;
    INSERT INTO usage_rollup AS r
    SELECT u.wallet_id, u.quarter, u.model, u.key_id,
           p_sign * count(*) FILTER (WHERE u.settled), p_sign * count(*) FILTER (WHERE NOT u.settled),
           p_sign * count(*) FILTER (WHERE u.settled AND u.accuracy = 'exact'),
           p_sign * coalesce(sum(u.prompt_tokens), 0), p_sign * coalesce(sum(u.completion_tokens), 0),
           p_sign * coalesce(sum(u.cached_read_tokens), 0), p_sign * coalesce(sum(u.cached_write_tokens), 0),
           p_sign * coalesce(sum(u.reasoning_tokens), 0), p_sign * sum(u.cost_nanousd), p_sign * sum(u.charge_nano),
           p_sign * coalesce(sum(u.spread_nano), 0), p_sign * sum(u.house_nanousd),
           p_sign * coalesce(sum(u.first_byte_ms), 0), p_sign * coalesce(sum(u.duration_ms), 0),
           ARRAY[p_sign * count(*) FILTER (WHERE u.first_bin = 0), p_sign * count(*) FILTER (WHERE u.first_bin = 1),
                 p_sign * count(*) FILTER (WHERE u.first_bin = 2), p_sign * count(*) FILTER (WHERE u.first_bin = 3),
                 p_sign * count(*) FILTER (WHERE u.first_bin = 4), p_sign * count(*) FILTER (WHERE u.first_bin = 5),
                 p_sign * count(*) FILTER (WHERE u.first_bin = 6), p_sign * count(*) FILTER (WHERE u.first_bin = 7),
                 p_sign * count(*) FILTER (WHERE u.first_bin = 8), p_sign * count(*) FILTER (WHERE u.first_bin = 9),
                 p_sign * count(*) FILTER (WHERE u.first_bin = 10), p_sign * count(*) FILTER (WHERE u.first_bin = 11)],
           ARRAY[p_sign * count(*) FILTER (WHERE u.last_bin = 0), p_sign * count(*) FILTER (WHERE u.last_bin = 1),
                 p_sign * count(*) FILTER (WHERE u.last_bin = 2), p_sign * count(*) FILTER (WHERE u.last_bin = 3),
                 p_sign * count(*) FILTER (WHERE u.last_bin = 4), p_sign * count(*) FILTER (WHERE u.last_bin = 5),
                 p_sign * count(*) FILTER (WHERE u.last_bin = 6), p_sign * count(*) FILTER (WHERE u.last_bin = 7),
                 p_sign * count(*) FILTER (WHERE u.last_bin = 8), p_sign * count(*) FILTER (WHERE u.last_bin = 9),
                 p_sign * count(*) FILTER (WHERE u.last_bin = 10), p_sign * count(*) FILTER (WHERE u.last_bin = 11)]
    FROM (SELECT c.wallet_id, usage_quarter(c.id) AS quarter, c.model,
                 coalesce(c.key_id, '00000000-0000-0000-0000-000000000000') AS key_id, c.state = 'settled' AS settled, c.accuracy,
                 c.cost_nanousd, c.charge_nano, c.spread_nano, c.house_nanousd, t.prompt_tokens, t.completion_tokens,
                 t.cached_read_tokens, t.cached_write_tokens, t.reasoning_tokens, t.first_byte_ms, t.duration_ms,
                 usage_bin(t.first_byte_ms) AS first_bin, usage_bin(t.duration_ms) AS last_bin
          FROM calls c LEFT JOIN usage t ON t.call_id = c.id AND t.call_id = ANY (p_ids) AND t.call_id BETWEEN low AND high
          WHERE c.id = ANY (p_ids) AND c.id BETWEEN low AND high AND c.state IN ('settled', 'void')
          OFFSET 0) u -- so that each bin is found once
    GROUP BY u.wallet_id, u.quarter, u.model, u.key_id
    ON CONFLICT (wallet_id, quarter, model, key_id) DO UPDATE SET
        calls = r.calls + excluded.calls, voids = r.voids + excluded.voids, exact = r.exact + excluded.exact,
        prompt_tokens = r.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = r.completion_tokens + excluded.completion_tokens,
        cached_read_tokens = r.cached_read_tokens + excluded.cached_read_tokens,
        cached_write_tokens = r.cached_write_tokens + excluded.cached_write_tokens,
        reasoning_tokens = r.reasoning_tokens + excluded.reasoning_tokens,
        cost_nanousd = r.cost_nanousd + excluded.cost_nanousd, charge_nano = r.charge_nano + excluded.charge_nano,
        spread_nano = r.spread_nano + excluded.spread_nano, house_nanousd = r.house_nanousd + excluded.house_nanousd,
        first_byte_ms = r.first_byte_ms + excluded.first_byte_ms, duration_ms = r.duration_ms + excluded.duration_ms,
        first_byte_bins = add_bins(r.first_byte_bins, excluded.first_byte_bins),
        duration_bins = add_bins(r.duration_bins, excluded.duration_bins);
END $$;

-- Sum the calls of whole quarters anew, from the first id to below the last; nothing is settled meanwhile.
CREATE OR REPLACE FUNCTION rebuild_usage(p_first uuid, p_end uuid) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    hour timestamptz;
    at   uuid := p_first;
BEGIN
    LOCK TABLE calls, usage_rollup IN SHARE ROW EXCLUSIVE MODE;
    DELETE FROM usage_rollup WHERE quarter >= usage_quarter(p_first) AND quarter < usage_quarter(p_end);
    LOOP -- from one hour that has calls to the next
        SELECT c.id INTO at FROM calls c WHERE c.id >= at AND c.id < p_end ORDER BY c.id LIMIT 1;
        EXIT WHEN NOT FOUND;
        hour := date_trunc('hour', uuid_moment(at), 'UTC') + interval '1 hour';
        PERFORM add_usage(array_agg(c.id), 1) FROM calls c WHERE c.id >= at AND c.id < least(uuid_floor(hour), p_end);
        at := uuid_floor(hour);
    END LOOP;
END $$;

-- Who changes what a call cost without the sums is stopped; whoever began to settle before there were any settles again.
CREATE OR REPLACE FUNCTION require_usage_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('tuma.usage_kept', true) IS DISTINCT FROM 'yes' THEN
        RAISE EXCEPTION 'what calls cost is changed with the sums of their usage, or not at all'
            USING ERRCODE = 'serialization_failure';
    END IF;
    RETURN NULL;
END $$;
