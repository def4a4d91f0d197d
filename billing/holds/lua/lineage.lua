-- Shared by the scripts: which history of writes this server continues, by its replication id. Replication is asynchronous: a
-- replica that became the primary lacks the last writes of the old one, and so may a server that started anew from its
-- file. Each begins another id then, so a mirror that carries another one is of a past that may be incomplete: it is cold.
local function lineage()
    return string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)') or ''
end

-- Take the right to fill a mirror. Returns 1, or 0 while somebody else has it; one of another lineage is nobody's.
local function claim(key, token, life)
    local owner = redis.call('GET', key)
    if owner and string.sub(owner, 1, #life + 1) == life .. ':' then return 0 end
    redis.call('SET', key, life .. ':' .. token, 'PX', 5000)
    return 1
end
