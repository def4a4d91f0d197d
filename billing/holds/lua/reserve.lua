-- Admit one call: every check, then the hold. One slot; amounts are decimal strings of nano units.
-- KEYS: 1 mirror  2 fill token  3 leases  then for each limiter: its window, its calls in flight
-- ARGV: 1 call  2 lease member  3 amount  4 -amount  5 lease ms  6 wallet  7 USD  8 -USD  9 key  10 user
--       11 arrived, unix ms  12 tokens of this call
--       then for each limiter: requests/min, tokens/min, calls in flight max (0: none)
-- Returns {verdict, n, limiter, remaining requests, reset ms, limiter, remaining tokens, reset ms, …}: of the limiter
-- that has the least left. n is the ms to wait when limited, and for 'cold' 1 if the caller shall fill the mirror; who
-- limits is the last of a limited reply, and of 'cap_exceeded' its scope, period, end, limit and what is left.
local now = redis.call('TIME')
local now_us = now[1] * 1000000 + now[2]
local now_ms = math.floor(now_us / 1000)
local available = 'available:' .. ARGV[6]

local life = lineage()
local state = redis.call('HMGET', KEYS[1], available, 'frozen:' .. ARGV[6], 'hold:' .. ARGV[1], 'capped', 'lineage')
local caps, over = {}, false
if state[1] and state[4] then caps, over = find_caps(KEYS[1], ARGV[6], ARGV[9], ARGV[10], tonumber(ARGV[11])) end
if not state[1] or over or state[5] ~= life then
    redis.call('DEL', KEYS[1]) -- it lacks a newer wallet, or has a window that is over, or is of another lineage
    return {'cold', claim(KEYS[2], ARGV[1], life)}
end

-- GCRA (ITU-T I.371): a window is the theoretical arrival time, in microseconds; a minute may be used in one burst.
local limiters, tokens = {}, tonumber(ARGV[12])
local function admit(tat, per_min, cost)
    local step = 60000000 / per_min
    local used = math.max(tonumber(tat or 0) - now_us, 0)
    return {used = used, after = used + step * cost, step = step, left = math.floor((60000000 - used) / step + 0.000001)}
end
for i = 1, (#KEYS - 3) / 2 do
    local window = redis.call('HMGET', KEYS[2 + 2 * i], 'requests', 'tokens')
    limiters[i] = {
        window = KEYS[2 + 2 * i], flight = KEYS[3 + 2 * i], most = tonumber(ARGV[12 + 3 * i]),
        requests = admit(window[1], tonumber(ARGV[10 + 3 * i]), 1),
        tokens = admit(window[2], tonumber(ARGV[11 + 3 * i]), tokens),
    }
end
local function reply(verdict, n, ...)
    local answer = {verdict, n}
    for _, what in ipairs({'requests', 'tokens'}) do
        local least = 1
        for i = 2, #limiters do
            if limiters[i][what].left < limiters[least][what].left then least = i end
        end
        local rate = limiters[least][what]
        answer[#answer + 1] = least
        answer[#answer + 1] = rate.left
        answer[#answer + 1] = math.ceil(rate.used / 1000)
    end
    for _, more in ipairs({...}) do answer[#answer + 1] = more end
    return answer
end

if state[3] then return reply('granted', 0) end -- a repeat of this very call
if state[2] then return reply('wallet_frozen', 0) end
for i, limiter in ipairs(limiters) do
    for _, what in ipairs({'requests', 'tokens'}) do
        local rate = limiter[what]
        if rate.after > 60000000 then return reply(what, math.ceil((rate.after - 60000000) / 1000), i) end
    end
    if limiter.most > 0 then
        redis.call('ZREMRANGEBYSCORE', limiter.flight, '-inf', now_ms)
        if redis.call('ZCARD', limiter.flight) >= limiter.most then return reply('calls_in_flight', 1000, i) end
    end
end
-- Lua's numbers lose integers above 2^53, so Redis does the arithmetic; the sign survives the conversion.
if redis.call('HINCRBY', KEYS[1], available, ARGV[4]) < 0 then
    redis.call('HINCRBY', KEYS[1], available, ARGV[3])
    return reply('insufficient_funds', 0)
end
local full = take_caps(KEYS[1], caps, ARGV[4], ARGV[8], ARGV[3], ARGV[7], '0', '0')
if full then
    redis.call('HINCRBY', KEYS[1], available, ARGV[3])
    return reply('cap_exceeded', 0, full.scope, full.period, full.ends, full.limit, redis.call('HGET', KEYS[1], full.field))
end

-- Nothing below can refuse.
redis.call('HSET', KEYS[1], 'hold:' .. ARGV[1], ARGV[3])
if state[4] then redis.call('HSET', KEYS[1], 'usd:' .. ARGV[1], ARGV[7]) end
redis.call('ZADD', KEYS[3], now_ms + ARGV[5], ARGV[2])
for _, limiter in ipairs(limiters) do
    local requests, used = limiter.requests, limiter.tokens
    redis.call('HSET', limiter.window, 'requests', string.format('%.0f', now_us + requests.after),
               'tokens', string.format('%.0f', now_us + used.after))
    redis.call('PEXPIRE', limiter.window, 61000)
    if limiter.most > 0 then
        redis.call('ZADD', limiter.flight, now_ms + ARGV[5], ARGV[1])
        redis.call('PEXPIRE', limiter.flight, 86400000)
    end
    requests.left, requests.used = math.max(requests.left - 1, 0), requests.after
    used.left, used.used = math.max(math.floor((60000000 - used.after) / used.step + 0.000001), 0), used.after
end
return reply('granted', 0)
