-- The live feed: what happens to a wallet that somebody watches, in the order of commits, without a gap in its numbers.

-- Which of these wallets are watched; NULL: none. As plpgsql it is planned once per connection, not in every batch.
CREATE OR REPLACE FUNCTION find_watched(p_wallet uuid[]) RETURNS uuid[] LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (SELECT array_agg(f.wallet_id) FROM feeds f WHERE f.wallet_id = ANY (p_wallet) AND f.watched_until > clock_timestamp());
END $$;

-- Append events, given in order, to the feeds of those of the wallets that are watched; tell the workers.
CREATE OR REPLACE FUNCTION add_to_feeds(p_wallet uuid[], p_kind text[], p_moved bigint[], p_holds bigint[], p_call uuid[], p_body jsonb[])
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    watched uuid[];
BEGIN
    SELECT array_agg(l.wallet_id) INTO watched
    FROM (SELECT f.wallet_id FROM feeds f WHERE f.wallet_id = ANY (p_wallet) AND f.watched_until > clock_timestamp()
          ORDER BY f.wallet_id FOR NO KEY UPDATE) l;
    IF watched IS NULL THEN
        RETURN;
    END IF;
    WITH told AS (
        INSERT INTO feed_events (wallet_id, seq, kind, moved_nano, holds_nano, posted_nano, held_nano, overdraft_nano, status,
                                 call_id, body)
        SELECT f.wallet_id, f.seq + row_number() OVER every, a.kind, a.moved, a.holds, f.posted_nano + sum(a.moved) OVER every,
               f.held_nano + sum(a.holds) OVER every, f.overdraft_nano, f.status, a.call_id, a.body
        FROM unnest(p_wallet, p_kind, p_moved, p_holds, p_call, p_body)
             WITH ORDINALITY AS a (wallet_id, kind, moved, holds, call_id, body, ord)
        JOIN feeds f ON f.wallet_id = a.wallet_id
        WHERE f.wallet_id = ANY (watched)
        WINDOW every AS (PARTITION BY f.wallet_id ORDER BY a.ord)
        RETURNING wallet_id, seq, moved_nano, holds_nano
    )
    UPDATE feeds f SET seq = t.seq, posted_nano = f.posted_nano + t.moved, held_nano = f.held_nano + t.holds
    FROM (SELECT t.wallet_id, max(t.seq) AS seq, sum(t.moved_nano)::bigint AS moved, sum(t.holds_nano)::bigint AS holds
          FROM told t GROUP BY t.wallet_id) t
    WHERE f.wallet_id = t.wallet_id;
    -- A payload has less than 8,000 bytes.
    PERFORM pg_notify('tuma', 'feed:' || CASE WHEN cardinality(watched) <= 200 THEN array_to_string(watched, ',') ELSE '*' END);
END $$;

-- Holds of new calls.
CREATE OR REPLACE FUNCTION tell_opened() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    watched uuid[] := find_watched(ARRAY(SELECT n.wallet_id FROM opened n WHERE n.hold_nano > 0));
BEGIN
    IF watched IS NOT NULL THEN
        PERFORM add_to_feeds(
            array_agg(n.wallet_id ORDER BY n.id), array_agg('hold'::text), array_agg(0::bigint),
            array_agg(n.hold_nano ORDER BY n.id), array_agg(n.id ORDER BY n.id),
            array_agg(jsonb_build_object('model', n.model) ORDER BY n.id))
        FROM opened n WHERE n.hold_nano > 0 AND n.wallet_id = ANY (watched);
    END IF;
    RETURN NULL;
END $$;

-- Holds that grew, and calls that ended: settled or void. (The rows before and after are joined by hash, however few they
-- were when this was planned.)
CREATE OR REPLACE FUNCTION tell_moved() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET enable_nestloop = off AS $$
DECLARE
    watched uuid[] := find_watched(ARRAY(SELECT n.wallet_id FROM became n));
BEGIN
    IF watched IS NOT NULL THEN
        PERFORM add_to_feeds(
            array_agg(m.wallet_id ORDER BY m.id), array_agg(m.kind ORDER BY m.id), array_agg(m.moved ORDER BY m.id),
            array_agg(m.holds ORDER BY m.id), array_agg(m.id ORDER BY m.id), array_agg(m.body ORDER BY m.id))
        FROM (
            SELECT n.id, n.wallet_id, e.ended, CASE WHEN e.ended THEN 'settlement' ELSE 'hold' END AS kind,
                   CASE WHEN e.ended THEN -n.charge_nano ELSE 0 END AS moved,
                   CASE WHEN e.ended THEN -n.hold_nano ELSE n.hold_nano - o.hold_nano END AS holds,
                   CASE WHEN e.ended
                        THEN jsonb_build_object('model', n.model, 'state', n.state, 'outcome', n.outcome, 'accuracy', n.accuracy,
                                                'cost_usd', major_text(n.cost_nanousd - n.house_nanousd),
                                                'charge', major_text(n.charge_nano))
                        ELSE jsonb_build_object('model', n.model) END AS body
            FROM became n JOIN was o ON o.id = n.id
            CROSS JOIN LATERAL (SELECT n.state IN ('settled', 'void') AS ended) e
            WHERE n.wallet_id = ANY (watched) AND o.state IN ('open', 'review')
        ) m
        WHERE m.moved <> 0 OR m.holds <> 0
        HAVING count(*) > 0;
    END IF;
    RETURN NULL;
END $$;

-- Everything else that is posted to a wallet.
CREATE OR REPLACE FUNCTION tell_posted() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    moved bigint := (SELECT sum(e.amount_nano) FROM journal_entry e WHERE e.tx_id = NEW.id AND e.wallet_id = NEW.wallet_id);
BEGIN
    IF moved <> 0 THEN
        PERFORM add_to_feeds(
            ARRAY[NEW.wallet_id], ARRAY[NEW.kind], ARRAY[moved], ARRAY[0::bigint], ARRAY[NEW.call_id],
            ARRAY[jsonb_build_object('transaction_id', NEW.id, 'description', NEW.memo)]);
    END IF;
    RETURN NULL;
END $$;

-- A wallet's status or overdraft.
CREATE OR REPLACE FUNCTION tell_wallet() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE feeds f SET overdraft_nano = NEW.overdraft_nano, status = NEW.status WHERE f.wallet_id = NEW.id;
    PERFORM add_to_feeds(ARRAY[NEW.id], ARRAY['wallet'], ARRAY[0::bigint], ARRAY[0::bigint], ARRAY[NULL::uuid], ARRAY['{}'::jsonb]);
    RETURN NULL;
END $$;

-- What a user is told besides. A cap of the user's own concerns all their wallets.
CREATE OR REPLACE FUNCTION tell_event() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM add_to_feeds(array_agg(w.id), array_agg(CASE NEW.kind WHEN 'cap.spent' THEN 'cap' WHEN 'wallet.low' THEN 'low' ELSE 'auto_topup' END), array_agg(0::bigint), array_agg(0::bigint), array_agg(NULL::uuid),
                         array_agg(NEW.body))
    FROM wallets w WHERE w.user_id = NEW.user_id AND (NEW.wallet_id IS NULL OR w.id = NEW.wallet_id)
    HAVING count(*) > 0;
    RETURN NULL;
END $$;
REVOKE EXECUTE ON FUNCTION tell_opened, tell_moved, tell_posted, tell_wallet, tell_event FROM PUBLIC;

-- Have events of these wallets written for `p_keep` from now on. A wallet that is watched for `p_sure` longer, which is more
-- than any transaction takes, is only prolonged. For any other one we wait until nobody moves its money: a transaction that
-- found it unwatched has ended, and every later one sees it watched. Where events may be missing, or the feed does not agree
-- with the wallet, the number jumps: numbers follow the clock in microseconds, so that none is ever given twice, though the
-- row be removed, and who goes on from an older one finds that something is missing.
CREATE OR REPLACE FUNCTION watch_wallets(p_wallet uuid[], p_keep interval, p_sure interval) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    purse wallets;
BEGIN
    FOR purse IN
        SELECT w.* FROM wallets w
        WHERE w.id = ANY (p_wallet)
          AND NOT EXISTS (SELECT FROM feeds f WHERE f.wallet_id = w.id AND f.watched_until > clock_timestamp() + p_sure)
        ORDER BY w.id FOR NO KEY UPDATE OF w
    LOOP
        INSERT INTO feeds AS f (wallet_id, seq, watched_until, posted_nano, held_nano, overdraft_nano, status)
        VALUES (purse.id, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, clock_timestamp() + p_keep,
                purse.posted_nano, purse.held_nano, purse.overdraft_nano, purse.status)
        ON CONFLICT (wallet_id) DO UPDATE SET watched_until = excluded.watched_until,
            seq = CASE WHEN f.watched_until > clock_timestamp()
                            AND (f.posted_nano, f.held_nano, f.overdraft_nano, f.status)
                                = (excluded.posted_nano, excluded.held_nano, excluded.overdraft_nano, excluded.status)
                       THEN f.seq ELSE greatest(f.seq + 1, excluded.seq) END,
            posted_nano = excluded.posted_nano, held_nano = excluded.held_nano,
            overdraft_nano = excluded.overdraft_nano, status = excluded.status;
    END LOOP;
    -- Whoever moves money holds the wallet, then asks for its feed: without the wallet nobody may hold a feed and wait. One that
    -- is busy just now is prolonged the next time, or as above once it is no longer sure.
    UPDATE feeds f SET watched_until = clock_timestamp() + p_keep
    FROM (SELECT l.wallet_id FROM feeds l
          WHERE l.wallet_id = ANY (p_wallet) AND l.watched_until > clock_timestamp() + p_sure
            AND l.watched_until < clock_timestamp() + p_keep * 0.9
          FOR NO KEY UPDATE SKIP LOCKED) l
    WHERE f.wallet_id = l.wallet_id;
END $$;

-- How watched wallets stand, and their events after the numbers given (NULL: none), at most `p_limit` of each; in one
-- snapshot. A wallet without events has one row, with event_seq NULL. agrees: the feed says of the wallet what is so.
CREATE OR REPLACE FUNCTION read_feeds(p_wallet uuid[], p_after bigint[], p_limit integer)
RETURNS TABLE (wallet_id uuid, currency text, seq bigint, agrees boolean, posted_nano bigint, held_nano bigint,
               overdraft_nano bigint, status text, event_seq bigint, kind text, moved_nano bigint, holds_nano bigint,
               event_posted_nano bigint, event_held_nano bigint, event_overdraft_nano bigint, event_status text,
               call_id uuid, body text, created_at timestamptz)
LANGUAGE sql STABLE AS $$
    SELECT f.wallet_id, w.currency, f.seq,
           (f.posted_nano, f.held_nano, f.overdraft_nano, f.status) = (w.posted_nano, w.held_nano, w.overdraft_nano, w.status),
           w.posted_nano, w.held_nano, w.overdraft_nano, w.status, e.seq, e.kind, e.moved_nano, e.holds_nano,
           e.posted_nano, e.held_nano, e.overdraft_nano, e.status, e.call_id, e.body::text, e.created_at
    FROM unnest(p_wallet, p_after) AS a (wallet_id, after)
    JOIN feeds f ON f.wallet_id = a.wallet_id JOIN wallets w ON w.id = f.wallet_id
    LEFT JOIN LATERAL (SELECT * FROM feed_events v WHERE v.wallet_id = a.wallet_id AND v.seq > a.after
                       ORDER BY v.seq LIMIT p_limit) e ON true
    ORDER BY f.wallet_id, e.seq
$$;

-- Remove events that are older than `p_keep`, and what is known of wallets that are watched no more; at most `p_limit` events.
CREATE OR REPLACE FUNCTION forget_feeds(p_keep interval, p_limit integer) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    gone bigint;
BEGIN
    DELETE FROM feed_events e USING (
        SELECT o.wallet_id, o.seq FROM feed_events o WHERE o.created_at < clock_timestamp() - p_keep
        ORDER BY o.created_at LIMIT p_limit) old
    WHERE e.wallet_id = old.wallet_id AND e.seq = old.seq;
    GET DIAGNOSTICS gone = ROW_COUNT;
    DELETE FROM feeds f USING (
        SELECT o.wallet_id FROM feeds o WHERE o.watched_until < clock_timestamp() - p_keep FOR UPDATE SKIP LOCKED) old
    WHERE f.wallet_id = old.wallet_id;
    RETURN gone;
END $$;
