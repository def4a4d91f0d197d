-- What payment providers send: kept once, and taken in turn. It is only a hint.

-- Keep what a provider sent; false: it is there already.
CREATE OR REPLACE FUNCTION receive_webhook(p_id uuid, p_provider text, p_key text, p_body text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_events (id, provider, event_key, body) VALUES (p_id, p_provider, p_key, p_body)
    ON CONFLICT (provider, event_key) DO NOTHING;
    IF FOUND THEN
        RETURN true;
    END IF;
    UPDATE webhook_events SET deliveries = deliveries + 1 WHERE provider = p_provider AND event_key = p_key;
    RETURN false;
END $$;

-- Events that are due, each to one process for as long as `p_lease`, doubled with every try up to an hour.
CREATE OR REPLACE FUNCTION take_webhooks(p_limit integer, p_lease interval) RETURNS SETOF webhook_events LANGUAGE sql AS $$
    UPDATE webhook_events e SET tries = e.tries + 1,
           next_at = now() + least(p_lease * power(2, least(e.tries, 20)), interval '1 hour')
    FROM (SELECT d.id FROM webhook_events d WHERE d.state = 'new' AND d.next_at <= now() ORDER BY d.next_at LIMIT p_limit
          FOR UPDATE SKIP LOCKED) due
    WHERE e.id = due.id RETURNING e.*
$$;

CREATE OR REPLACE FUNCTION end_webhook(p_id uuid, p_state text, p_note text) RETURNS void LANGUAGE sql AS $$
    UPDATE webhook_events SET state = p_state, note = p_note, ended_at = now() WHERE id = p_id AND state = 'new'
$$;

-- A webhook that ended without effect is due again, as if it had just come. False: it has not ended so, or is none.
CREATE OR REPLACE FUNCTION retry_webhook(p_id uuid) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE webhook_events SET state = 'new', note = '', tries = 0, next_at = now(), ended_at = NULL
    WHERE id = p_id AND state IN ('review', 'ignored');
    RETURN FOUND;
END $$;
