-- Months: ids tell when they were minted, and the big tables are partitioned by them.

-- The smallest UUIDv7 of a moment (RFC 9562, section 5.7: 48 bits of unix milliseconds first).
CREATE OR REPLACE FUNCTION uuid_floor(moment timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
    SELECT (lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
$$;

-- The moment that a UUIDv7 was minted, to the millisecond.
CREATE OR REPLACE FUNCTION uuid_moment(id uuid) RETURNS timestamptz LANGUAGE sql IMMUTABLE AS $$
    SELECT to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 1000.0)
$$;

-- Make the month partitions from last month to `ahead` months from now. The default partitions take what no month
-- covers, so that a settlement never fails for want of a partition. The sums of usage have months of their own; what is
-- append-only is not truncated.
-- * Months are added to a time without zone. To a `timestamptz` they are added on the session's clock, and on a server west
--   of Greenwich the month after November began on its last day.
-- * A month of which the default partition has rows already (nobody made partitions for months) stays there: Postgres
--   refuses a partition for it, and the sweeper, which asks for all of them, would never sweep again.
CREATE OR REPLACE FUNCTION ensure_partitions(ahead integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    parent text;
    month  timestamp;
    low    text;
    high   text;
    child  text;
    key    text;
    there  boolean;
    made   integer := 0;
BEGIN
    FOREACH parent IN ARRAY ARRAY['calls', 'usage', 'usage_rollup', 'journal_tx', 'journal_entry'] LOOP
        key := CASE parent WHEN 'usage_rollup' THEN 'quarter' WHEN 'usage' THEN 'call_id' WHEN 'journal_entry' THEN 'tx_id' ELSE 'id' END;
        FOR step IN -1..ahead LOOP
            month := date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => step);
            child := parent || to_char(month, '_YYYY_MM');
            CONTINUE WHEN to_regclass(child) IS NOT NULL;
            low := month AT TIME ZONE 'UTC';
            high := (month + interval '1 month') AT TIME ZONE 'UTC';
            IF parent <> 'usage_rollup' THEN
                low := uuid_floor(low::timestamptz);
                high := uuid_floor(high::timestamptz);
            END IF;
            EXECUTE format('SELECT EXISTS (SELECT FROM %I WHERE %I >= %L AND %I < %L)', parent || '_default', key, low, key, high)
            INTO there;
            CONTINUE WHEN there;
            BEGIN
                EXECUTE format('CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L)', child, parent, low, high);
            EXCEPTION WHEN check_violation OR invalid_object_definition THEN
                CONTINUE; -- a row came meanwhile, or an older partition reaches into this month
            END;
            IF parent IN ('journal_tx', 'journal_entry') THEN
                PERFORM refuse_truncate(child);
            END IF;
            made := made + 1;
        END LOOP;
    END LOOP;
    RETURN made;
END $$;
