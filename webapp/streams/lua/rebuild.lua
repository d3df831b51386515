-- REBUILD: make a log that Redis has lost, with all its text, in one step: in two a fence could come in between, at an
-- end that lies before what was seen. A state of an older epoch, made since by somebody who was late, gives way.
-- KEYS 1 state, 2 log. ARGV 1 epoch, 2 owner, 3 TTL in seconds; then of each piece its end, kind and text, from position 0 on.
local state = redis.call('HMGET', KEYS[1], 'epoch', 'fence', 'end', 'tlen', 'fenced_us')
if state[1] and tonumber(state[1]) > tonumber(ARGV[1]) then
  return {'STALE', state[1]}
end
if state[1] == ARGV[1] then -- made before, and the answer was lost; or by a terminator, for whom nobody owned it
  if state[2] then
    return {'FENCED', state[3], state[4], state[2], state[5]}
  end
  return {'OK', state[3], state[4]}
end
redis.call('DEL', KEYS[1], KEYS[2])
local stop, thinking = 0, 0
for n = 4, #ARGV, 3 do
  stop = ARGV[n]
  redis.call('XADD', KEYS[2], stop .. '-0', ARGV[n + 1], ARGV[n + 2])
  if ARGV[n + 1] == 't' then
    thinking = stop
  end
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'owner', ARGV[2], 'end', stop, 'tlen', thinking, 'seq', 0)
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return {'OK', stop, thinking}
