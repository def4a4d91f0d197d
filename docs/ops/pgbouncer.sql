-- What PgBouncer looks up logins with; run once as a superuser in Tuma's database, after `tuma migrate`, then give the role a
-- password: ALTER ROLE pgbouncer PASSWORD '…'. It sees the verifiers of Tuma's roles and of the user that owns the schema, never
-- a superuser's.
CREATE ROLE pgbouncer LOGIN;
CREATE SCHEMA pgbouncer;
CREATE FUNCTION pgbouncer.find_login(wanted text) RETURNS TABLE (name text, verifier text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT a.rolname::text, a.rolpassword FROM pg_authid a
    WHERE a.rolname = wanted AND a.rolcanlogin AND NOT a.rolsuper AND (a.rolvaliduntil IS NULL OR a.rolvaliduntil > now())
      AND (a.rolname LIKE 'tuma\_%' OR pg_has_role(a.oid, 'tuma_owner', 'MEMBER'))
$$;
REVOKE ALL ON FUNCTION pgbouncer.find_login(text) FROM PUBLIC;
GRANT USAGE ON SCHEMA pgbouncer TO pgbouncer;
GRANT EXECUTE ON FUNCTION pgbouncer.find_login(text) TO pgbouncer;
