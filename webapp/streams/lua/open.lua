-- OPEN: make a session's state, or raise it to a newer epoch. The only verb that creates anything.
-- KEYS 1 state, 2 log. ARGV 1 epoch, 2 owner ('' while queued), 3 TTL in seconds.
local state = redis.call('HMGET', KEYS[1], 'epoch', 'fence', 'end', 'tlen', 'fenced_us', 'done')
if not state[1] then
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'owner', ARGV[2], 'end', 0, 'tlen', 0, 'seq', 0)
  redis.call('EXPIRE', KEYS[1], ARGV[3])
  return {'OK', 0, 0}
end
if tonumber(state[1]) > tonumber(ARGV[1]) then
  return {'STALE', state[1]}
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'owner', ARGV[2])
if not state[6] then -- another attempt may last as long again
  redis.call('EXPIRE', KEYS[1], ARGV[3])
  redis.call('EXPIRE', KEYS[2], ARGV[3])
end
if state[2] then
  return {'FENCED', state[3], state[4], state[2], state[5]}
end
return {'OK', state[3], state[4]}
