-- Shared by the scripts: the caps of a mirror that a call counts in. A call that arrived before a window began belongs to
-- an earlier one, of which only Postgres knows.
-- Returns a list of {field, usd, period, scope, ends, limit}, and whether a window that the mirror knows is over.
local function find_caps(mirror, wallet, key, user, arrived_ms)
    local scopes = {wallet, key, user}
    local lists = redis.call('HMGET', mirror, 'caps:' .. wallet, 'caps:' .. key, 'caps:' .. user)
    local found, over = {}, false
    for i = 1, 3 do
        for period, starts, ends, limit in string.gmatch(lists[i] or '', '(%a+):(%d+):(%d+):(%d+)') do
            if arrived_ms >= tonumber(ends) then
                over = true
            elseif arrived_ms >= tonumber(starts) then
                found[#found + 1] = {
                    field = 'left:' .. scopes[i] .. ':' .. period, usd = i == 3, period = period, scope = scopes[i],
                    ends = ends, limit = limit,
                }
            end
        end
    end
    return found, over
end

-- Take amounts (negative, as decimal strings) from what caps have left; a cap per call is looked at, never kept. Returns
-- nil, or the cap that refuses, and then nothing is taken. `give`: the same amounts, positive; `held`: held before.
local function take_caps(mirror, caps, take, take_usd, give, give_usd, held, held_usd)
    for i, cap in ipairs(caps) do
        local left = redis.call('HINCRBY', mirror, cap.field, cap.usd and take_usd or take)
        if cap.period == 'call' then
            local before = cap.usd and held_usd or held
            if before ~= '0' then
                left = redis.call('HINCRBY', mirror, cap.field, '-' .. before)
                redis.call('HINCRBY', mirror, cap.field, before)
            end
            redis.call('HINCRBY', mirror, cap.field, cap.usd and give_usd or give)
        end
        if left < 0 then
            for j = 1, i do
                if caps[j].period ~= 'call' then
                    redis.call('HINCRBY', mirror, caps[j].field, caps[j].usd and give_usd or give)
                end
            end
            return cap
        end
    end
    return nil
end
